"""Zip archives with a map of labels, as Microsoft's Swin Transformer keeps ImageNet: `train.zip` and `train_map.txt`,
`val.zip` and `val_map.txt`.

Each line of a map is `path<TAB>label`. A path is a member of the archive of the map's name; `other.zip@/inner/path` is
a member of another archive below the root; where the map has no archive of its name, it is a file below the root. Its
ImageNet-22K maps are JSON lists of `[path, label]` instead, and are read likewise.

N images
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from swinmoe.config import DataConfig
from swinmoe.data.archive import ArchiveFiles, check_labels, class_id
from swinmoe.data.folder import IMAGENET_MEAN, IMAGENET_STD
from swinmoe.data.source import FileSource, RawData, decode
from swinmoe.data.zip_directory import content, directory, local_name, readable
from swinmoe.errors import DataError

_TRAIN = ("train_map.txt", "ILSVRC2011fall_whole_map_train.txt")
_EVAL = {
    "val_map.txt": "val",
    "test_map.txt": "test",
    "ILSVRC2011fall_whole_map_val.txt": "val",
}
_LAYOUT = "ROOT/train.zip with ROOT/train_map.txt, and ROOT/val.zip with ROOT/val_map.txt (lines: path<TAB>label)"
_MARK = ".zip@"


@dataclass(frozen=True)
class ZipSource:
    """Members of zip archives, by position; 32 bytes of memory each."""

    files: ArchiveFiles
    archive: npt.NDArray[np.int32]
    """(N,) numbers of `files`."""
    offset: npt.NDArray[np.int64]
    """(N,) of local headers."""
    size: npt.NDArray[np.int64]
    """(N,) bytes in the archive."""
    crc: npt.NDArray[np.uint32]
    """(N,)"""
    targets: Tensor
    """(N,) int64."""

    def take(self, positions: Tensor) -> ZipSource:
        """The images at `positions` (n,), in that order."""
        p = positions.numpy()
        return ZipSource(
            self.files, self.archive[p], self.offset[p], self.size[p], self.crc[p], self.targets[positions]
        )

    def open(self, index: int) -> Image.Image:
        """Image `index` as RGB; `DataError` naming archive and member if it is damaged."""
        where = int(self.archive[index]), int(self.offset[index])
        try:
            data = content(self.files, *where, int(self.size[index]), int(self.crc[index]))
        except DataError as error:
            raise DataError(f"image {self.name(index)} is damaged ({error}); fetch the archive again") from error
        return decode(io.BytesIO(data), lambda: self.name(index))

    def name(self, index: int) -> str:
        """`archive.zip@/inner/path`, or the place in the archive where not even the name can be read."""
        archive, offset = int(self.archive[index]), int(self.offset[index])
        try:
            return f"{self.files.paths[archive]}@/{local_name(self.files, archive, offset)}"
        except DataError:
            return f"{self.files.paths[archive]} (member at byte {offset})"


def load_zip(cfg: DataConfig) -> RawData:
    """RGB images of the archives that the maps name.

    Raises:
        DataError: no root or map, a line without a label, a path named twice, a missing or encrypted member, a damaged
            archive, or a label out of range.
    """
    if cfg.root is None:
        raise DataError(f"data.name=zip needs data.root=ROOT, a folder laid out as {_LAYOUT}")
    root = Path(cfg.root)
    train_map = _find(root, cfg.train_files, _TRAIN)
    if train_map is None:
        state = f"has no map {' or '.join(_TRAIN)}" if root.is_dir() else "does not exist"
        raise DataError(f"data.root={root} {state}; it must hold {_LAYOUT}, or name the map as data.train_files")
    eval_map = _find(root, cfg.eval_files, tuple(_EVAL))
    train = _read(root, train_map)
    evaluation = None if eval_map is None else _read(root, eval_map)
    classes = check_labels(train, evaluation, cfg.num_classes)
    return RawData(
        train=train,
        eval=evaluation,
        eval_split="val" if eval_map is None else _EVAL.get(eval_map.name, "val"),
        class_names=tuple(f"class {number}" for number in range(classes)),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def _find(root: Path, given: str | None, usual: tuple[str, ...]) -> Path | None:
    if given is None:
        return next((root / name for name in usual if (root / name).is_file()), None)
    if not (root / given).is_file():
        raise DataError(f"map {root / given} does not exist; name a file of lines path<TAB>label below data.root")
    return root / given


def _read(root: Path, path: Path) -> ZipSource | FileSource:
    """The images of one map, in its order."""
    names, labels = _parse(path)
    own = root / f"{path.name.removesuffix('_map.txt')}.zip"
    archived = own.is_file() and path.name.endswith("_map.txt")
    if not archived and not any(_MARK in name for name in names):
        if path.name.endswith("_map.txt") and names and not (root / names[0]).exists():
            raise DataError(f"{path} names {names[0]}, but neither {own} nor {root / names[0]} exists; add one of them")
        return FileSource.of([str(root / name) for name in names], labels)
    wanted: dict[str, dict[str, int]] = {}
    for position, name in enumerate(names):
        archive, member = _split(root, own if archived else None, name, path)
        if wanted.setdefault(archive, {}).setdefault(member, position) != position:
            raise DataError(f"{path} names {name} twice; keep one of the lines")
    count = len(names)
    number, offset = np.zeros(count, np.int32), np.full(count, -1, np.int64)
    size, crc = np.zeros(count, np.int64), np.zeros(count, np.uint32)
    for which, (archive, members) in enumerate(wanted.items()):
        for entry in directory(archive):
            at = members.get(entry.name)
            if at is None:
                continue
            if offset[at] >= 0:
                raise DataError(f"{archive} holds {entry.name} twice, so {path} does not say which; pack it again")
            readable(entry, archive)
            number[at], offset[at], size[at], crc[at] = which, entry.offset, entry.size, entry.crc
    missing = np.flatnonzero(offset < 0)
    if len(missing):
        archive, member = _split(root, own if archived else None, names[missing[0]], path)
        raise DataError(
            f"{archive} lacks {member}, and {len(missing)} of the {count} images that {path} names are in no archive; "
            "the archive is not the map's, or not whole"
        )
    return ZipSource(ArchiveFiles(list(wanted)), number, offset, size, crc, torch.tensor(labels, dtype=torch.int64))


def _split(root: Path, own: Path | None, name: str, path: Path) -> tuple[str, str]:
    """Archive and member that a path in a map means."""
    archive, mark, member = name.partition(_MARK)
    if mark:
        return str(root / f"{archive}.zip"), member.lstrip("/")
    if own is None:
        raise DataError(f"{path} names {name} beside members of archives; write it as ARCHIVE.zip@/{name}")
    return str(own), name.lstrip("/")


def _parse(path: Path) -> tuple[list[str], list[int]]:
    """Paths and labels of a map, of either kind."""
    names: list[str] = []
    labels: list[int] = []
    try:
        with path.open(encoding="utf-8") as file:
            if file.read(1) == "[":
                file.seek(0)
                rows: Any = json.load(file)
                for number, row in enumerate(rows):
                    if not isinstance(row, list) or len(row) < 2 or not isinstance(row[0], str):
                        raise DataError(f"{path}, entry {number}: {row!r} is not [path, label]")
                    names.append(row[0])
                    labels.append(_label(row[1], f"{path}, entry {number}"))
                return names, labels
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip():
                    fields = line.rstrip("\r\n").split("\t")
                    if len(fields) < 2:
                        raise DataError(f"{path}, line {number}: {line.strip()!r} is not path<TAB>label")
                    names.append(fields[0])
                    labels.append(_label(fields[1], f"{path}, line {number}"))
    except (OSError, ValueError) as error:  # a UnicodeDecodeError and a JSONDecodeError are ValueErrors
        raise DataError(f"map {path} cannot be read ({error})") from error
    return names, labels


def _label(value: Any, where: str) -> int:
    try:
        return class_id(value)
    except ValueError as error:
        raise DataError(f"{where}: no class id ({error})") from error
