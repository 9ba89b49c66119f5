"""The index of tar shards: made once, made again when a shard changes; and every way in which a shard can be wrong."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from swinmoe.config import DataConfig
from swinmoe.data import build_data
from swinmoe.data import tar_index as module
from swinmoe.data.order import windowed
from swinmoe.errors import DataError

Put = Callable[[tarfile.TarFile, str, bytes], None]
PNG = b"not looked at"


def _cfg(root: Path, **values) -> DataConfig:
    return DataConfig(name="tar", root=str(root), image_size=(24, 24), **values)


def _index(path: Path) -> module.TarIndex:
    return module.tar_index(path, index_dir=None, label_key="label")


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each shard was walked."""
    seen: Counter[str] = Counter()
    scan = module._scan

    def counted(shard: Path, label_key: str) -> module.TarIndex:
        seen[shard.name] += 1
        return scan(shard, label_key)

    monkeypatch.setattr(module, "_scan", counted)
    return seen


def test_a_shard_is_walked_once_and_again_when_it_changed(tar_root: Path, scans: Counter[str]) -> None:
    first = build_data(_cfg(tar_root), seed=0).train.targets
    assert torch.equal(build_data(_cfg(tar_root), seed=0).train.targets, first)
    assert set(scans.values()) == {1} and len(scans) == 4
    shard = tar_root / "train-000000.tar"
    stat = shard.stat()
    shard.write_bytes(shard.read_bytes().replace(b"0\n", b"1\n", 1))
    os.utime(shard, ns=(stat.st_mtime_ns + 1, stat.st_mtime_ns + 1))  # as long as before, a nanosecond younger
    assert not torch.equal(build_data(_cfg(tar_root), seed=0).train.targets, first)
    assert scans["train-000000.tar"] == 2 and scans["train-000001.tar"] == 1
    (tar_root / "train-000001.index.json").write_text('{"format": 1')
    build_data(_cfg(tar_root), seed=0)
    assert scans["train-000001.tar"] == 2
    assert not list(tar_root.glob("*.tmp"))


def test_indices_may_lie_elsewhere_and_do_not_collide(tar_root: Path, tmp_path: Path, scans: Counter[str]) -> None:
    for split in ("train", "val"):
        (tar_root / split).mkdir()
        for number in range(2):
            (tar_root / f"{split}-{number:06}.tar").rename(tar_root / split / f"{number:06}.tar")
    cfg = _cfg(tar_root, index_dir=str(tmp_path / "new" / "indices"))
    for _ in range(2):
        bundle = build_data(cfg, seed=0)
        assert bundle.train.targets.tolist() == [0, 0, 0, 1, 1, 1] and bundle.eval.targets.tolist() == [0, 0, 1, 1]
    assert scans == {"000000.tar": 2, "000001.tar": 2}
    assert len(list((tmp_path / "new" / "indices").iterdir())) == 4
    assert not list(tar_root.rglob("*.json"))


def test_an_index_that_cannot_be_written_tells_the_way_out(tar_root: Path) -> None:
    (tar_root / "file").write_text("")
    with pytest.raises(DataError, match=r"index .* cannot be written \(.*\); set data\.index_dir"):
        build_data(_cfg(tar_root, index_dir=str(tar_root / "file" / "below")), seed=0)


def test_another_label_key_makes_another_index(tmp_path: Path, put: Put) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        put(tar, "k.jpg", PNG)
        put(tar, "k.json", b'{"label": 3, "fine": 5}')
    for key, expected in (("label", 3), ("fine", 5), ("label", 3)):
        assert module.tar_index(tmp_path / "a.tar", index_dir=None, label_key=key).labels == [expected]
    with pytest.raises(DataError, match=r"k\.jpg has no class id: add k\.cls, or k\.json .*data\.label_key"):
        module.tar_index(tmp_path / "a.tar", index_dir=None, label_key="coarse")


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_point_at_the_images_in_every_dialect(tmp_path: Path, put: Put, kind: int) -> None:
    path = tmp_path / "a.tar"
    long = "x" * 90 if kind == tarfile.USTAR_FORMAT else "ü" * 150
    with tarfile.open(path, "w", format=kind) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        put(tar, "folder/._a.jpg", b"what a Mac adds")
        put(tar, "folder/a.JPG", b"1" * 700)
        put(tar, "folder/a.cls", b"4")
        put(tar, "folder/a.seg.png", b"a mask")
        put(tar, f"{long}.jpeg", b"2" * 512)
        put(tar, f"{long}.cls", b"7")
        put(tar, f"{long}.json", b'{"label": 9}')
    index, raw = _index(path), path.read_bytes()
    assert index.members == ["folder/a.JPG", f"{long}.jpeg"]
    assert index.labels == [4, 7]
    pieces = [raw[at : at + size] for at, size in zip(index.offsets, index.sizes, strict=True)]
    assert pieces == [b"1" * 700, b"2" * 512]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b""}, r"a\.tar: a\.jpg has no class id: add a\.cls"),
        ({"a.cls": b"1"}, r"a\.tar: the key 'a' has a label but no image"),
        ({"a.jpg": b"", "a.png": b"", "a.cls": b"1"}, r"a\.tar: a\.png is a second image of the key 'a'"),
        ({"a.jpg": b"", "a.cls": b"cat"}, r"a\.tar: a\.cls holds no class id .*'cat'"),
        ({"a.jpg": b"", "a.cls": b"\xff"}, r"a\.tar: a\.cls holds no class id"),
        ({"a.jpg": b"", "a.json": b"{"}, r"a\.tar: a\.json holds no class id"),
        ({"a.jpg": b"", "a.json": b'{"label": 1.5}'}, r"a\.tar: a\.json holds no class id \(1\.5"),
        ({"a.jpg": b"", "a.json": b"[]"}, r"a\.tar: a\.jpg has no class id"),
        (
            {"a.jpg": b"", "a.cls": b"1", "b.jpg": b"", "b.cls": b"1", "a.png": b""},
            r"a\.tar: a\.png comes back to the key 'a'",
        ),
        ({"a.jpg": b"", "a.cls": b"1", "a.CLS": b"1"}, r"a\.tar: a\.CLS is there twice"),
    ],
)
def test_wrong_samples_are_named(tmp_path: Path, put: Put, members: dict[str, bytes], message: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in members.items():
            put(tar, name, content)
    with pytest.raises(DataError, match=message):
        _index(tmp_path / "a.tar")
    assert not list(tmp_path.glob("*.json"))


@pytest.fixture
def whole(tmp_path: Path, put: Put) -> bytes:
    """Three samples in six members of one block each behind a header; the end mark is at 12 blocks."""
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        for key in "abc":
            put(tar, f"{key}.jpg", b"x" * 512)
            put(tar, f"{key}.cls", b"1")
    return (tmp_path / "whole.tar").read_bytes()


@pytest.mark.parametrize("blocks", [0.5, 1, 1.5, 2, 4, 6.3, 8, 11.5, 12, 13])
def test_a_shard_cut_anywhere_is_refused(tmp_path: Path, whole: bytes, blocks: float) -> None:
    path = tmp_path / "cut.tar"
    path.write_bytes(whole[: int(blocks * 512)])
    with pytest.raises(DataError, match=r"cut\.tar"):
        _index(path)
    path.write_bytes(whole[: 14 * 512])
    assert _index(path).members == ["a.jpg", "b.jpg", "c.jpg"]


def test_a_damaged_header_a_second_archive_and_compression_are_refused(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "bad.tar"
    broken = bytearray(whole)
    broken[4 * 512 + 10] ^= 1
    path.write_bytes(broken)
    with pytest.raises(DataError, match=r"bad\.tar is damaged: after its last readable member, at byte 2048"):
        _index(path)
    path.write_bytes(whole + whole)
    with pytest.raises(
        DataError, match=r"bad\.tar is damaged: after its last readable member, at byte \d+, comes neither"
    ):
        _index(path)
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match=r"bad\.tar cannot be read to its end .*compress"):
        _index(path)


def test_a_damaged_image_is_named_when_it_is_met(tar_root: Path) -> None:
    bundle = build_data(_cfg(tar_root), seed=0)
    shard = tar_root / "val-000001.tar"
    index = json.loads((tar_root / "val-000001.index.json").read_text())
    raw = bytearray(shard.read_bytes())
    stat = shard.stat()
    raw[index["offsets"][1] : index["offsets"][1] + 8] = b"rubbish!"
    shard.write_bytes(raw)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    bundle.eval.sample(None, 2)
    with pytest.raises(DataError, match=r"val-000001\.tar@/\./val/0001\.png cannot be decoded \(it is of no known"):
        bundle.eval.sample(None, 3)


def test_ranges_name_every_shard(tar_root: Path) -> None:
    names = {"train_files": "train-{000000..000001}.tar", "eval_files": "val-00000?.tar"}
    assert len(build_data(_cfg(tar_root, **names), seed=0).train) == 6
    assert len(build_data(_cfg(tar_root, train_files="train-{000001..000001}.tar"), seed=0).train) == 3
    with pytest.raises(DataError, match=r"2 of the 4 shards that train-.* are missing .*: train-000002\.tar"):
        build_data(_cfg(tar_root, train_files="train-{000000..000003}.tar"), seed=0)
    with pytest.raises(DataError, match=r"has no shards none-\*\.tar"):
        build_data(_cfg(tar_root, train_files="none-*.tar"), seed=0)


def test_a_window_visits_shards_in_turn_and_mixes_nearby_images_only() -> None:
    archive = np.repeat(np.arange(6, dtype=np.int32), [5, 3, 8, 1, 7, 4])
    orders = [windowed(archive, 4, torch.Generator().manual_seed(seed)) for seed in range(20)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(28))
        visited = [int(archive[i]) for i in order]
        spans = [max(p for p, v in enumerate(visited) if v == s) - visited.index(s) for s in range(6)]
        assert all(span < count + 2 * 4 for span, count in zip(spans, [5, 3, 8, 1, 7, 4], strict=True))
    assert len({tuple(dict.fromkeys(archive[order].tolist())) for order in orders}) > 10
    alone = windowed(archive, 1, torch.Generator().manual_seed(0))
    turns = [s for i, s in enumerate(archive[alone]) if i == 0 or archive[alone][i - 1] != s]
    assert sorted(turns) == list(range(6))
    assert all(alone[archive[alone] == s].tolist() == np.flatnonzero(archive == s).tolist() for s in range(6))


def test_an_image_of_a_mode_other_than_rgb_is_converted(tar_root: Path) -> None:
    assert isinstance(build_data(_cfg(tar_root), seed=0).train._source.open(1), Image.Image)
    assert build_data(_cfg(tar_root), seed=0).train._source.open(1).mode == "RGB"
