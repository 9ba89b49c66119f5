"""Which samples reach which rank, when. One process plays every rank in turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swinmoe.config import AugmentConfig, DataConfig, MixupConfig
from swinmoe.data import Batch, ImageDataset, TrainStream, build_data, eval_batches
from swinmoe.errors import ConfigError

CFG = DataConfig(image_size=(8, 8), limit=50, augment=AugmentConfig(crop_padding=1))


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return build_data(CFG, seed=0).train


def _stream(dataset: ImageDataset, **values: Any) -> TrainStream:
    settings: dict[str, Any] = {
        "data": CFG, "batch_size": 12, "accumulation": 1, "rank": 0, "world": 1, "seed": 0,
        "num_classes": 10, "label_smoothing": 0.1,
    }  # fmt: skip
    return TrainStream(dataset, **{**settings, **values})


def _same(a: Batch, b: Batch) -> bool:
    soft = (a.soft_targets is None) == (b.soft_targets is None)
    if a.soft_targets is not None and b.soft_targets is not None:
        soft = torch.equal(a.soft_targets, b.soft_targets)
    return (
        soft
        and torch.equal(a.images, b.images)
        and torch.equal(a.targets, b.targets)
        and torch.equal(a.indices, b.indices)
    )


def test_a_batch_is_what_the_data_set_says(data: ImageDataset) -> None:
    (batch,) = next(_stream(data).iterate(5, 6))  # epoch 1, for an epoch has 4 steps
    assert batch.images.shape == (12, 1, 8, 8) and len(batch) == 12
    assert batch.targets.dtype == batch.indices.dtype == torch.int64
    assert batch.soft_targets is None
    for row, index in enumerate(batch.indices.tolist()):
        image, target = data.sample(1, index)
        assert torch.equal(batch.images[row], image)
        assert int(batch.targets[row]) == target == int(data.targets[index])


def test_epochs_are_different_permutations_without_their_tails(data: ImageDataset) -> None:
    stream = _stream(data)
    assert stream.steps_per_epoch == 4
    seen = [batch.indices for (batch,) in stream.iterate(0, 12)]
    assert len(seen) == 12
    epochs = [torch.cat(seen[start : start + 4]) for start in (0, 4, 8)]
    for epoch in epochs:
        assert len(epoch.unique()) == 48 and epoch.min() >= 0 and epoch.max() < 50
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    other = torch.cat([batch.indices for (batch,) in _stream(data, seed=1).iterate(0, 4)])
    assert not torch.equal(other, epochs[0])


@pytest.mark.parametrize("start", [1, 4, 7, 11])
def test_starting_anywhere_gives_what_would_have_come(data: ImageDataset, start: int) -> None:
    whole = list(_stream(data).iterate(0, 12))
    part = list(_stream(data).iterate(start, 12))
    assert len(part) == 12 - start
    assert all(_same(a, b) for (a,), (b,) in zip(whole[start:], part, strict=True))


def test_starting_late_loads_nothing_that_came_before(data: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int | None, int]] = []
    batch = data.batch
    monkeypatch.setattr(data, "batch", lambda epoch, ids: asked.extend((epoch, i) for i in ids) or batch(epoch, ids))
    list(_stream(data).iterate(1000, 1001))
    assert len(asked) == 12 and {epoch for epoch, _ in asked} == {250}


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 1), (3, 2), (4, 3), (12, 1), (1, 12)])
def test_ranks_and_micro_batches_divide_the_same_global_batch(
    data: ImageDataset, world: int, accumulation: int
) -> None:
    whole = [batch for (batch,) in _stream(data).iterate(2, 6)]
    ranks = [list(_stream(data, rank=r, world=world, accumulation=accumulation).iterate(2, 6)) for r in range(world)]
    for step, expected in enumerate(whole):
        micro = [ranks[r][step][m] for m in range(accumulation) for r in range(world)]
        assert all(len(part) == 12 // (world * accumulation) for part in micro)
        joined = Batch(
            torch.cat([part.images for part in micro]),
            torch.cat([part.targets for part in micro]),
            None,
            torch.cat([part.indices for part in micro]),
        )
        assert _same(joined, expected)


def test_with_mixup_batches_carry_soft_targets_by_epoch_and_first_index(data: ImageDataset) -> None:
    cfg = DataConfig(image_size=(8, 8), mixup=MixupConfig(mixup=0.8, cutmix=1.0))
    (whole,) = list(_stream(data, data=cfg, accumulation=2).iterate(3, 4))
    (alone,) = list(_stream(data, data=cfg, world=2, rank=1).iterate(3, 4))
    assert whole[0].soft_targets is not None and whole[0].soft_targets.shape == (6, 10)
    assert _same(whole[1], alone[0])  # the second micro-batch of one rank is the only one of the second rank
    torch.testing.assert_close(whole[0].soft_targets.sum(1), torch.ones(6))
    plain, _ = data.batch(0, whole[0].indices.tolist())
    assert not torch.equal(whole[0].images, plain)


def test_impossible_batches_are_refused(data: ImageDataset) -> None:
    with pytest.raises(ConfigError, match=r"batch_size=10 .* 2 rank\(s\) x 2 .* multiple of 4, e\.g\. 8 or 12"):
        _stream(data, batch_size=10, world=2, accumulation=2)
    with pytest.raises(ConfigError, match=r"batch_size=2 .*e\.g\. 4"):
        _stream(data, batch_size=2, world=4)
    with pytest.raises(ConfigError, match=r"has 50 images, fewer than one train\.batch_size=64; use .*=48 or less"):
        _stream(data, batch_size=64, world=4)
    cfg = DataConfig(mixup=MixupConfig(mixup=0.8))
    with pytest.raises(ConfigError, match=r"micro-batch has 3 images; .* multiple of 8"):
        _stream(data, batch_size=12, world=4, data=cfg)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 16, 50, 64])
def test_evaluation_sees_every_sample_once_in_equally_many_batches(
    data: ImageDataset, world: int, batch_size: int
) -> None:
    ranks = [list(eval_batches(data, batch_size=batch_size, rank=r, world=world)) for r in range(world)]
    assert {len(batches) for batches in ranks} == {-(-50 // batch_size)}
    seen = sorted(index for batches in ranks for batch in batches for index in batch.indices.tolist())
    assert seen == list(range(50))
    for step in zip(*ranks, strict=True):
        sizes = [len(batch) for batch in step]
        assert max(sizes) - min(sizes) <= 1
        for batch in step:
            assert batch.images.shape[1:] == (1, 8, 8) and batch.images.dtype == torch.float32
            assert batch.soft_targets is None
            assert torch.equal(batch.images, data.batch(None, batch.indices.tolist())[0])
            assert torch.equal(batch.targets, data.targets[batch.indices])


def test_evaluation_steps_hold_the_same_samples_for_any_world(data: ImageDataset) -> None:
    one = [batch.indices for batch in eval_batches(data, batch_size=16, rank=0, world=1)]
    three = zip(*(eval_batches(data, batch_size=16, rank=r, world=3) for r in range(3)), strict=True)
    assert all(torch.equal(torch.cat([b.indices for b in step]), a) for a, step in zip(one, three, strict=True))


def test_evaluation_is_shuffled_so_that_no_batch_is_of_one_class(data: ImageDataset) -> None:
    first = next(eval_batches(data, batch_size=16, rank=0, world=1)).indices
    assert first.tolist() != sorted(first.tolist())


def test_an_evaluation_batch_of_nothing_is_refused(data: ImageDataset) -> None:
    with pytest.raises(ConfigError, match="eval_batch_size=0"):
        eval_batches(data, batch_size=0, rank=0, world=1)


def test_batches_move_whole(data: ImageDataset) -> None:
    (batch,) = next(_stream(data).iterate(0, 1))
    moved = batch.to("meta")
    assert moved.images.device.type == moved.targets.device.type == moved.indices.device.type == "meta"
    assert moved.soft_targets is None and _same(batch.to("cpu"), batch)
