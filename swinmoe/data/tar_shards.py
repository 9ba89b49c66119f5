"""Tar shards as WebDataset names them, `name-{000000..000999}.tar`, read at random by their indices.

WebDataset itself reads each shard from front to back and shuffles what passes through a buffer; then what an epoch
shows depends on how shards are dealt to ranks and workers. A tar file is not compressed, so once it is known where its
members are, any of them can be read alone, and a run's order is the same exact shuffle as with any other data set.

N images, A shards
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from swinmoe.config import DataConfig
from swinmoe.data.archive import ArchiveFiles, check_labels
from swinmoe.data.folder import IMAGENET_MEAN, IMAGENET_STD
from swinmoe.data.source import RawData, decode
from swinmoe.data.tar_index import tar_index
from swinmoe.errors import DataError

_TRAIN = ("train-*.tar", "train/*.tar")
_EVAL = {"val-*.tar": "val", "val/*.tar": "val", "test-*.tar": "test", "test/*.tar": "test"}
_LAYOUT = "ROOT/train-000000.tar ... and ROOT/val-000000.tar ... (members KEY.jpg and KEY.cls or KEY.json)"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class TarSource:
    """Members of tar shards, by position; 28 bytes of memory each."""

    files: ArchiveFiles
    shard: npt.NDArray[np.int32]
    """(N,) numbers of `files`."""
    offset: npt.NDArray[np.int64]
    """(N,) of first bytes."""
    size: npt.NDArray[np.int64]
    """(N,) bytes."""
    targets: Tensor
    """(N,) int64."""
    index_dir: Path | None
    label_key: str

    @staticmethod
    def of(shards: list[Path], *, index_dir: Path | None, label_key: str) -> TarSource:
        """All samples of the shards, in their order; one index is in memory at a time. Errors are `tar_index`'s."""
        counts, offsets, sizes, labels = [], [], [], []
        for shard in shards:
            index = tar_index(shard, index_dir=index_dir, label_key=label_key)
            counts.append(len(index.labels))
            offsets.append(np.array(index.offsets, dtype=np.int64))
            sizes.append(np.array(index.sizes, dtype=np.int64))
            labels.append(np.array(index.labels, dtype=np.int64))
        return TarSource(
            ArchiveFiles([str(shard) for shard in shards]),
            np.repeat(np.arange(len(shards), dtype=np.int32), counts),
            np.concatenate(offsets),
            np.concatenate(sizes),
            torch.from_numpy(np.concatenate(labels)),
            index_dir,
            label_key,
        )

    def take(self, positions: Tensor) -> TarSource:
        """The images at `positions` (n,), in that order."""
        p = positions.numpy()
        return TarSource(
            self.files,
            self.shard[p],
            self.offset[p],
            self.size[p],
            self.targets[positions],
            self.index_dir,
            self.label_key,
        )

    def open(self, index: int) -> Image.Image:
        """Image `index` as RGB; `DataError` naming shard and member if it is damaged."""
        data = self.files.read(int(self.shard[index]), int(self.offset[index]), int(self.size[index]))
        return decode(io.BytesIO(data), lambda: self.name(index))

    def name(self, index: int) -> str:
        """`shard.tar@/member`. Names are looked up in the index on disk: in memory they would take the most room."""
        shard, offset = Path(self.files.paths[int(self.shard[index])]), int(self.offset[index])
        try:
            found = tar_index(shard, index_dir=self.index_dir, label_key=self.label_key)
            return f"{shard}@/{found.members[found.offsets.index(offset)]}"
        except (DataError, ValueError):
            return f"{shard} (member at byte {offset})"


def load_tar(cfg: DataConfig) -> RawData:
    """RGB images of the shards below `cfg.root`.

    Raises:
        DataError: no root, missing shards, a damaged or malformed one, or a label out of range.
    """
    if cfg.root is None:
        raise DataError(f"data.name=tar needs data.root=ROOT, a folder laid out as {_LAYOUT}")
    root = Path(cfg.root)
    train = next(filter(None, (_shards(root, p) for p in ((cfg.train_files,) if cfg.train_files else _TRAIN))), None)
    if train is None:
        state = f"has no shards {cfg.train_files or ' or '.join(_TRAIN)}" if root.is_dir() else "does not exist"
        raise DataError(f"data.root={root} {state}; it must hold {_LAYOUT}, or name them as data.train_files")
    patterns = {cfg.eval_files: "val"} if cfg.eval_files else _EVAL
    evaluation = {split: shards for pattern, split in reversed(patterns.items()) if (shards := _shards(root, pattern))}
    if cfg.eval_files and not evaluation:
        raise DataError(f"data.root={root} has no shards data.eval_files={cfg.eval_files}")
    split = "val" if "val" in evaluation else "test"
    index_dir = None if cfg.index_dir is None else Path(cfg.index_dir)
    source = TarSource.of(train, index_dir=index_dir, label_key=cfg.label_key)
    held = None
    if evaluation:
        held = TarSource.of(evaluation[split], index_dir=index_dir, label_key=cfg.label_key)
    classes = check_labels(source, held, cfg.num_classes)
    return RawData(
        train=source,
        eval=held,
        eval_split=split,
        class_names=tuple(f"class {number}" for number in range(classes)),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def _shards(root: Path, pattern: str) -> list[Path]:
    """The files that a pattern names: every one of a range `{000000..000999}`, or those that match `*`, by name."""
    found = _RANGE.search(pattern)
    if found is None:
        return sorted(root.glob(pattern))
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    paths = [root / _RANGE.sub(f"{number:0{len(first)}}", pattern, count=1) for number in numbers]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        raise DataError(
            f"{len(missing)} of the {len(paths)} shards that {pattern} names are missing below {root}"
            f"{': ' + missing[0].name if missing else ''}; fetch them, or name fewer"
        )
    return paths
