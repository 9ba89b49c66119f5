from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from swinmoe.config import AugmentConfig, DataConfig
from swinmoe.data import ImageDataset, build_data
from swinmoe.data.source import ArraySource
from swinmoe.data.transforms import _posterize
from swinmoe.errors import ConfigError

HEAVY = AugmentConfig(
    crop_padding=2,
    random_resized_crop=(0.2, 1.0),
    horizontal_flip=0.5,
    rand_augment="rand-m9-mstd0.5-inc1",
    random_erasing=0.5,
)
EACH = {
    "crop": AugmentConfig(crop_padding=3),
    "flip": AugmentConfig(horizontal_flip=0.5),
    "resized": AugmentConfig(random_resized_crop=(0.2, 1.0)),
    "rand_augment": AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1"),
    "jitter": AugmentConfig(color_jitter=0.4),
    "erasing": AugmentConfig(random_erasing=1.0),
    "all": HEAVY,
}


def _data(augment: AugmentConfig, *, size=(16, 12), channels: int = 3, seed: int = 0, count: int = 24) -> ImageDataset:
    rng = np.random.default_rng(3)
    shape = (count, *size) if channels == 1 else (count, *size, channels)
    source = ArraySource(rng.integers(0, 256, shape, dtype=np.uint8), torch.arange(count) % 5)
    return ImageDataset(source, size=size, mean=(0.4,) * channels, std=(0.2,) * channels, augment=augment, seed=seed)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", EACH.values(), ids=EACH)
def test_a_view_depends_on_seed_epoch_and_index_only(augment: AugmentConfig, channels: int, rng_untouched) -> None:
    data = _data(augment, channels=channels)
    with rng_untouched():
        forward = [data.sample(4, index)[0] for index in range(24)]
    torch.rand(5)
    np.random.rand(3)
    again = _data(augment, channels=channels)
    assert all(torch.equal(again.sample(4, index)[0], forward[index]) for index in reversed(range(24)))
    batch, targets = again.batch(4, list(range(24)))
    assert torch.equal(batch, torch.stack(forward))
    assert torch.equal(targets, again.targets)
    for changed in (_data(augment, channels=channels).batch(5, list(range(24)))[0],
                    _data(augment, channels=channels, seed=1).batch(4, list(range(24)))[0]):  # fmt: skip
        assert not torch.equal(changed, batch)
    plain = data.batch(None, list(range(24)))[0]
    assert not torch.equal(batch, plain)
    assert batch.dtype == torch.float32 and batch.shape == (24, channels, 16, 12)
    assert torch.isfinite(batch).all()


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_vectorised_path_equals_the_one_image_path(padding: int, flip: float, channels: int) -> None:
    data = _data(AugmentConfig(crop_padding=padding, horizontal_flip=flip), channels=channels)
    for size in (1, 3, 24):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(size))[:size].tolist()
        single = [data.sample(2, index) for index in order]
        images, targets = data.batch(2, order)
        assert torch.equal(images, torch.stack([image for image, _ in single]))
        assert targets.tolist() == [target for _, target in single]


def _decode(view: Tensor, plain: Tensor, padding: int) -> tuple[int, int, bool]:
    """Which offsets and flip turn `plain` into `view`, by trying all of them."""
    padded = np.full((plain.shape[0], *(side + 2 * padding for side in plain.shape[1:])), (0 - 0.4) / 0.2, np.float32)
    padded[:, padding:-padding, padding:-padding] = plain.numpy()
    H, W = plain.shape[1:]
    hits = [
        (y, x, flip)
        for y in range(2 * padding + 1)
        for x in range(2 * padding + 1)
        for flip in (False, True)
        if np.allclose(padded[:, y : y + H, x : x + W][:, :, :: -1 if flip else 1], view.numpy(), atol=1e-6)
    ]
    assert len(hits) == 1
    return hits[0]


def test_padded_crops_reach_every_offset_and_flips_come_at_their_rate() -> None:
    data = _data(AugmentConfig(crop_padding=1, horizontal_flip=0.25))
    plain = data.batch(None, list(range(24)))[0]
    found = [
        _decode(view, plain[index], 1)
        for epoch in range(20)
        for index, view in enumerate(data.batch(epoch, range(24))[0])
    ]
    counts = np.zeros((3, 3))
    for y, x, _ in found:
        counts[y, x] += 1
    assert counts.min() > 480 / 9 * 0.6
    assert np.mean([flip for *_, flip in found]) == pytest.approx(0.25, abs=0.06)  # three standard deviations


def test_plain_views_are_normalised_pixels_whatever_the_epoch() -> None:
    data = ImageDataset(
        ArraySource(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), torch.zeros(1, dtype=torch.int64)),
        size=(16, 16), mean=(0.25,), std=(0.5,),
    )  # fmt: skip
    expected = (torch.arange(256).view(1, 16, 16) / 255 - 0.25) / 0.5
    for epoch in (None, 0, 7):
        torch.testing.assert_close(data.sample(epoch, 0)[0], expected, rtol=0, atol=1e-6)
    assert np.array_equal(data.image(0)[..., 2].ravel(), np.arange(256))


def test_an_empty_batch_is_legal() -> None:
    for augment in (None, AugmentConfig(crop_padding=1), HEAVY):
        images, targets = _data(augment or AugmentConfig()).batch(0, [])
        assert images.shape == (0, 3, 16, 12) and images.dtype == torch.float32
        assert targets.shape == (0,) and targets.dtype == torch.int64


def test_full_magnitude_rand_augment_posterises_to_one_bit_rather_than_none() -> None:
    data = _data(AugmentConfig(rand_augment="rand-m10-n8-inc1"), count=8)
    for epoch in range(6):  # some 50 of these 384 operations ask for 0 bits
        data.batch(epoch, list(range(8)))
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for bits, mask in ((0, 0x80), (1, 0x80), (4, 0xF0), (8, 0xFF)):
        assert np.array_equal(np.array(_posterize(picture, bits)).ravel(), np.arange(256) & mask)


def test_erasing_replaces_one_rectangle_with_noise() -> None:
    data = _data(AugmentConfig(random_erasing=1.0), size=(32, 32), channels=3, count=24)
    plain = data.batch(None, list(range(24)))[0]
    for index, view in enumerate(data.batch(0, list(range(24)))[0]):
        changed = (view != plain[index]).all(0)
        rows, columns = changed.any(1).nonzero().ravel(), changed.any(0).nonzero().ravel()
        assert changed.sum() == len(rows) * len(columns)
        assert 0 < len(rows) * len(columns) < 0.4 * 32 * 32


@pytest.mark.parametrize(
    ("augment", "says"),
    [
        (AugmentConfig(rand_augment="augmix-m5"), "use e.g. rand-m9-mstd0.5-inc1"),
        (AugmentConfig(rand_augment="rand-q9"), "use e.g. rand-m9-mstd0.5-inc1"),
    ],
)
def test_impossible_augmentations_are_refused(augment: AugmentConfig, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_data(DataConfig(augment=augment), seed=0)
