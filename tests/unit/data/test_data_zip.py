"""Our reader of zip directories against Python's, and every way in which an archive or its map can be wrong."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from swinmoe.config import DataConfig
from swinmoe.data import build_data
from swinmoe.data.archive import ArchiveFiles
from swinmoe.data.zip_directory import content, directory, local_name
from swinmoe.errors import DataError


def _cfg(root: Path, **values) -> DataConfig:
    return DataConfig(name="zip", root=str(root), image_size=(24, 24), **values)


def _check(path: Path) -> int:
    """All members as Python's reader has them; their number."""
    files = ArchiveFiles([str(path)])
    entries = list(directory(str(path)))
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        assert [(e.name, e.offset, e.size, e.crc, e.method) for e in entries] == [
            (i.filename, i.header_offset, i.compress_size, i.CRC, i.compress_type) for i in infos
        ]
        for entry in entries:
            assert content(files, 0, entry.offset, entry.size, entry.crc) == archive.read(entry.name)
            assert local_name(files, 0, entry.offset) == entry.name
    return len(entries)


def test_the_directory_is_pythons(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = b"a comment" * 20
        archive.writestr("plain.txt", b"x" * 1000)
        archive.writestr("deflated.txt", b"y" * 1000, zipfile.ZIP_DEFLATED)
        archive.writestr("ümläut/名.txt", b"")
        archive.mkdir("folder")
        with archive.open("large field.txt", "w", force_zip64=True) as member:
            member.write(b"z" * 10)
    assert _check(path) == 5
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    assert _check(tmp_path / "empty.zip") == 0


def test_more_members_than_16_bits_count(tmp_path: Path) -> None:
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(0x10000):
            archive.writestr(zipfile.ZipInfo(str(number)), b"")
    names = [entry.name for entry in directory(str(path))]
    assert names == [str(number) for number in range(0x10000)]


def test_values_of_64_bits_come_from_the_extra_field(tmp_path: Path) -> None:
    """A directory that puts sizes and offset in the ZIP64 field, as one of an archive beyond 4 GiB does."""
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 0, 0x8C736521, 3, 3, 1, 0) + b"afoo"
    zeros = struct.pack("<2H", 0xCAFE, 2) + b"\0\0"
    wide = zeros + struct.pack("<2H3Q", 1, 24, 3, 3, 0)
    most = 0xFFFFFFFF
    entry = struct.pack(
        "<4s6H3L5H2L", b"PK\1\2", 45, 45, 0, 0, 0, 0, 0x8C736521, most, most, 1, len(wide), 0, 0, 0, 0, most
    )
    central = entry + b"a" + wide
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(central), len(local), 0)
    (tmp_path / "wide.zip").write_bytes(local + central + end)
    assert _check(tmp_path / "wide.zip") == 1
    (tmp_path / "bad.zip").write_bytes(local + central.replace(b"\1\0\x18\0", b"\2\0\x18\0") + end)
    with pytest.raises(DataError, match=r"bad\.zip@/a lacks its ZIP64 field"):
        list(directory(str(tmp_path / "bad.zip")))
    far = central.replace(struct.pack("<3Q", 3, 3, 0), struct.pack("<3Q", 3, 3, 5))
    (tmp_path / "far.zip").write_bytes(local + far + end)
    with pytest.raises(DataError, match=r"far\.zip@/a lies outside the archive"):
        list(directory(str(tmp_path / "far.zip")))


@pytest.mark.parametrize("cut", [1, 21, 22, 23, 60, 200])
def test_a_cut_archive_is_refused(zip_root: Path, cut: int) -> None:
    path = zip_root / "train.zip"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match=r"train\.zip.*(cut off|damaged)"):
        build_data(_cfg(zip_root), seed=0)


def test_a_part_missing_from_the_middle_is_refused(zip_root: Path) -> None:
    path = zip_root / "val.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[:300] + whole[400:])
    with pytest.raises(DataError, match=r"val\.zip.* damaged"):
        build_data(_cfg(zip_root), seed=0)


def test_paths_into_other_archives_and_files_below_the_root(zip_root: Path, image_folder: Path) -> None:
    expected = build_data(_cfg(zip_root), seed=0)
    lines = (zip_root / "train_map.txt").read_text().splitlines()
    (zip_root / "parts").mkdir()
    shutil.copy(zip_root / "train.zip", zip_root / "parts" / "other.zip")
    mixed = [f"parts/other.zip@/{line}" if number % 2 else line for number, line in enumerate(lines)]
    (zip_root / "train_map.txt").write_text("\n".join(mixed))
    as_json = [line.replace("cat/", "val/cat/").replace("dog/", "val/dog/").split("\t") for line in
               (zip_root / "val_map.txt").read_text().splitlines()]  # fmt: skip
    shutil.copytree(image_folder / "val", zip_root / "val")
    (zip_root / "val.json").write_text(json.dumps([[path, int(label)] for path, label in as_json]))
    found = build_data(_cfg(zip_root, eval_files="val.json"), seed=0)
    for split in ("train", "eval"):
        a, b = getattr(found, split), getattr(expected, split)
        assert all(torch.equal(x, y) for x, y in zip(a.batch(0, range(len(a))), b.batch(0, range(len(b))), strict=True))
    assert len({*found.train._source.archive.tolist()}) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines, "cat/9.png\t0"], r"train\.zip lacks cat/9\.png, and 1 of the 7 images"),
        (lambda lines: [*lines, lines[0]], r"train_map\.txt names cat/0\.png twice"),
        (lambda lines: [*lines, "cat/9.png 0"], r"train_map\.txt, line 7: 'cat/9\.png 0' is not path<TAB>label"),
        (lambda lines: [*lines, "cat/9.png\tdog"], r"train_map\.txt, line 7: no class id .*'dog'"),
        (lambda lines: [lines[0][:-1] + "-1", *lines[1:]], r"train\.zip@/cat/0\.png has label -1"),
        (lambda lines: [*lines, "gone.zip@/a.png\t0"], r"gone\.zip cannot be read \(No such file"),
        (lambda lines: [], r"lists no training image"),
        (lambda lines: ['[["a.png"]]'], r"train_map\.txt, entry 0: \['a\.png'\] is not \[path, label\]"),
        (lambda lines: ['[["a.png", 1.5]]'], r"train_map\.txt, entry 0: no class id \(1\.5"),
        (lambda lines: ["[["], r"map .*train_map\.txt cannot be read"),
    ],
)
def test_wrong_maps_are_named(zip_root: Path, change: Callable[[list[str]], list[str]], message: str) -> None:
    path = zip_root / "train_map.txt"
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(DataError, match=message):
        build_data(_cfg(zip_root), seed=0)


def test_a_map_without_its_archive_is_told(zip_root: Path) -> None:
    (zip_root / "train.zip").unlink()
    with pytest.raises(DataError, match=r"names cat/0\.png, but neither .*train\.zip nor .*cat/0\.png exists"):
        build_data(_cfg(zip_root), seed=0)


def test_members_twice_encrypted_or_of_unknown_compression_are_refused(zip_root: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(zip_root / "train.zip", "a") as archive:
        archive.writestr("cat/0.png", b"another")
    with pytest.raises(DataError, match=r"train\.zip holds cat/0\.png twice"):
        build_data(_cfg(zip_root), seed=0)
    raw = (zip_root / "val.zip").read_bytes()
    at = raw.index(b"PK\1\2", raw.index(b"PK\1\2") + 1)  # the first picture's entry
    for place, value, message in ((8, b"\1\0", "is encrypted"), (10, b"\x0e\0", "is compressed by method 14")):
        (zip_root / "train.zip").write_bytes(raw[: at + place] + value + raw[at + place + 2 :])
        shutil.copy(zip_root / "val_map.txt", zip_root / "train_map.txt")
        with pytest.raises(DataError, match=rf"train\.zip@/dog/1\.png {message}"):
            build_data(_cfg(zip_root), seed=0)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_member_is_named_when_it_is_met(zip_root: Path, split: str) -> None:
    path = zip_root / f"{split}.zip"
    raw = bytearray(path.read_bytes())
    entry = next(entry for entry in directory(str(path)) if entry.name == "dog/1.png")
    raw[entry.offset + 200] ^= 0x10
    path.write_bytes(raw)
    bundle = build_data(_cfg(zip_root), seed=0)
    data, index = (bundle.train, 4) if split == "train" else (bundle.eval, 3)
    data.sample(None, index - 1)
    with pytest.raises(DataError, match=rf"image .*{split}\.zip@/dog/1\.png is damaged \(its? .*(CRC|decompress)"):
        data.sample(None, index)


def test_what_is_no_picture_is_named(zip_root: Path) -> None:
    for name in ("train", "val"):
        with zipfile.ZipFile(zip_root / f"{name}.zip", "a") as archive:
            archive.writestr("odd.png", b"text")
        with (zip_root / f"{name}_map.txt").open("a") as file:
            file.write("odd.png\t0\n")
    with pytest.raises(DataError, match=r"train\.zip@/odd\.png cannot be decoded \(it is of no known format\)"):
        build_data(_cfg(zip_root), seed=0).train.sample(None, 6)
