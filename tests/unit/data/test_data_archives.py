"""Zip + map and tar shards against the class folder that they were made of: the same bits in the same order."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from swinmoe.config import AugmentConfig, DataConfig
from swinmoe.data import Batch, DataBundle, TrainStream, build_data, eval_batches
from swinmoe.data.archive import ArchiveFiles
from swinmoe.errors import ConfigError, DataError

AUGMENT = AugmentConfig(random_resized_crop=(0.3, 1.0), horizontal_flip=0.5, rand_augment="rand-m9-mstd0.5-inc1")


@pytest.fixture
def roots(image_folder: Path, zip_root: Path, tar_root: Path) -> dict[str, Path]:
    return {"folder": image_folder, "zip": zip_root, "tar": tar_root}


def _cfg(name: str, roots: dict[str, Path], **values: Any) -> DataConfig:
    return DataConfig(name=name, root=str(roots[name]), image_size=(24, 24), augment=AUGMENT, **values)


def _stream(cfg: DataConfig, rank: int = 0, world: int = 1, data: DataBundle | None = None) -> TrainStream:
    return TrainStream(
        (data or build_data(cfg, seed=5)).train, data=cfg, batch_size=4, accumulation=1, rank=rank, world=world, seed=5,
        num_classes=2, label_smoothing=0.0,
    )  # fmt: skip


def _all(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.cat([getattr(b, part) for b in batches]) for part in ("images", "targets", "indices"))


def _steps(cfg: DataConfig, start: int, stop: int, world: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What all ranks together saw, in the order of the global batch."""
    ranks = [list(_stream(cfg, rank, world).iterate(start, stop)) for rank in range(world)]
    return _all([micro for step in zip(*ranks, strict=True) for (micro,) in step])


def _equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["zip", "tar"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(name: str, workers: int, roots: dict[str, Path]) -> None:
    cfg = _cfg(name, roots, workers=workers)
    assert _equal(_steps(cfg, 0, 4), _steps(_cfg("folder", roots), 0, 4))
    mine, theirs = build_data(cfg, seed=5), build_data(_cfg("folder", roots), seed=5)
    assert (mine.num_classes, mine.channels, mine.mean, mine.std) == (2, 3, theirs.mean, theirs.std)
    assert mine.eval_split == "val" and mine.class_names == ("class 0", "class 1")
    assert _equal(
        _all(list(eval_batches(mine.eval, batch_size=3, rank=0, world=1, workers=workers))),
        _all(list(eval_batches(theirs.eval, batch_size=3, rank=0, world=1))),
    )


@pytest.mark.parametrize(("name", "window"), [("zip", None), ("tar", None), ("tar", 2)])
@pytest.mark.parametrize("world", [2, 4])
def test_resuming_on_other_numbers_of_ranks_goes_on_in_the_same_order(
    name: str, window: int | None, world: int, roots: dict[str, Path]
) -> None:
    cfg = _cfg(name, roots, shuffle_window=window)
    whole = _steps(cfg, 0, 5)
    before, after = _steps(cfg, 0, 2), _steps(cfg, 2, 5, world)
    assert _equal(whole, tuple(torch.cat(pair) for pair in zip(before, after, strict=True)))


@pytest.mark.parametrize("name", ["zip", "tar"])
def test_holdout_and_limit_cut_as_in_the_folder(name: str, roots: dict[str, Path]) -> None:
    mine, theirs = (build_data(_cfg(n, roots, holdout=2, limit=3), seed=0) for n in (name, "folder"))
    for split in ("train", "eval"):
        a, b = getattr(mine, split), getattr(theirs, split)
        assert _equal(a.batch(0, range(len(a))), b.batch(0, range(len(b))))
    assert len(mine.train) == 3 and len(mine.eval) == 2


@pytest.mark.parametrize("name", ["zip", "tar"])
def test_a_copy_for_a_spawned_process_opens_its_own_files(name: str, roots: dict[str, Path]) -> None:
    data = build_data(_cfg(name, roots), seed=0).eval
    first = data.sample(None, 0)[0]
    source = data._source
    assert source.files._descriptors
    copy = pickle.loads(pickle.dumps(source))
    assert not copy.files._descriptors
    assert copy.open(0).tobytes() == source.open(0).tobytes()
    assert torch.equal(data.sample(None, 0)[0], first)


def test_few_files_are_open_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(5)]
    for path in paths:
        path.write_bytes(path.name.encode() * 10)
    files = ArchiveFiles([str(path) for path in paths], limit=2)
    for number, still_open in ((0, [0]), (1, [0, 1]), (0, [1, 0]), (2, [0, 2]), (3, [2, 3]), (4, [3, 4]), (0, [4, 0])):
        assert files.read(number, 2, 3) == str(number).encode() * 3
        assert list(files._descriptors) == still_open
    assert files.read(1, 0, 0) == b""
    with pytest.raises(DataError, match=r"/3 ends 2 bytes before byte 12"):
        files.read(3, 8, 4)
    paths[2].unlink()
    with pytest.raises(DataError, match=r"/2 cannot be read \(No such file"):
        files.read(2, 0, 1)


@pytest.mark.parametrize("name", ["zip", "tar"])
def test_labels_out_of_range_name_the_image(name: str, roots: dict[str, Path]) -> None:
    assert build_data(_cfg(name, roots, num_classes=7), seed=0).num_classes == 7
    where = {"zip": r"train\.zip@/dog/0\.png", "tar": r"train-000001\.tar@/\./train/0000\.png"}[name]
    with pytest.raises(
        DataError, match=rf"{where} has label 1, and 3 image\(s\) .* 0 \.\.\. 0 \(data\.num_classes=1\)"
    ):
        build_data(_cfg(name, roots, num_classes=1), seed=0)


@pytest.mark.parametrize("name", ["zip", "tar"])
def test_no_root_no_files_and_no_evaluation_images_are_told(name: str, roots: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"data\.name={name} needs data\.root=ROOT"):
        build_data(DataConfig(name=name), seed=0)
    with pytest.raises(DataError, match="nowhere does not exist"):
        build_data(_cfg(name, {name: tmp_path / "nowhere"}), seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no (map|shards) .*data\.train_files"):
        build_data(_cfg(name, {name: tmp_path / "empty"}), seed=0)
    for path in roots[name].glob("val*"):
        path.unlink()
    with pytest.raises(DataError, match=r"has neither .*val.* nor .*test.*data\.holdout"):
        build_data(_cfg(name, roots), seed=0)
    with pytest.raises(DataError, match=r"gone\.txt"):
        build_data(_cfg(name, roots, eval_files="gone.txt"), seed=0)


def test_a_window_is_for_shards() -> None:
    with pytest.raises(ConfigError, match=r"data\.shuffle_window=8 is for data\.name=tar, not zip"):
        DataConfig(name="zip", shuffle_window=8)
    with pytest.raises(ConfigError, match=r"shuffle_window=0"):
        DataConfig(name="tar", shuffle_window=0)
    with pytest.raises(ConfigError, match=r"num_classes=0"):
        DataConfig(name="tar", num_classes=0)
