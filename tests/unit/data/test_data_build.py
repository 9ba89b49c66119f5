from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swinmoe.config import AugmentConfig, DataConfig
from swinmoe.data import DataBundle, build_data
from swinmoe.errors import ConfigError


def _images(bundle: DataBundle, split: str) -> set[bytes]:
    data = getattr(bundle, split)
    return {data.image(index).tobytes() for index in range(len(data))}


def test_digits_bundle() -> None:
    bundle = build_data(DataConfig(image_size=(16, 24)), seed=0)
    assert (len(bundle.train), len(bundle.eval), bundle.eval_split) == (1437, 360, "test")
    assert (bundle.num_classes, bundle.channels, bundle.class_names[3]) == (10, 1, "3")
    image, target = bundle.train.sample(0, 5)
    assert image.shape == (1, 16, 24) and image.dtype == torch.float32
    assert target == 5 == int(bundle.train.targets[5])
    whole = bundle.train.batch(None, list(range(1437)))[0]
    assert abs(whole.mean()) < 0.05 and abs(whole.std() - 1) < 0.1


def test_a_holdout_is_a_partition_of_the_training_images_by_its_own_seed() -> None:
    size: dict[str, Any] = {"image_size": (8, 8)}
    whole = build_data(DataConfig(**size), seed=0)
    one = build_data(DataConfig(holdout=200, **size), seed=0)
    assert (len(one.train), len(one.eval), one.eval_split) == (1237, 200, "holdout")
    assert _images(one, "train") | _images(one, "eval") == _images(whole, "train")
    assert not _images(one, "train") & _images(one, "eval")
    same = build_data(DataConfig(holdout=200, **size), seed=5)
    other = build_data(DataConfig(holdout=200, holdout_seed=1, **size), seed=0)
    assert _images(same, "eval") == _images(one, "eval") != _images(other, "eval")


def test_the_holdout_is_seen_plainly() -> None:
    augment = AugmentConfig(crop_padding=2, horizontal_flip=1.0, random_erasing=1.0)
    bundle = build_data(DataConfig(holdout=20, image_size=(8, 8), augment=augment), seed=0)
    assert torch.equal(bundle.eval.sample(3, 1)[0], bundle.eval.sample(None, 1)[0])
    assert not torch.equal(bundle.train.sample(3, 1)[0], bundle.train.sample(None, 1)[0])


def test_limit_takes_the_first_of_both_splits() -> None:
    whole = build_data(DataConfig(image_size=(8, 8)), seed=0)
    few = build_data(DataConfig(image_size=(8, 8), limit=400), seed=0)
    assert (len(few.train), len(few.eval)) == (400, 360)
    assert torch.equal(few.train.targets, whole.train.targets[:400])
    assert np.array_equal(few.train.image(399), whole.train.image(399))


def test_grey_to_rgb_repeats_and_rgb_to_grey_is_luma() -> None:
    grey = build_data(DataConfig(image_size=(8, 8), limit=3), seed=0)
    colour = build_data(DataConfig(image_size=(8, 8), limit=3, channels=3), seed=0)
    assert colour.mean == grey.mean * 3 and colour.channels == 3
    assert torch.equal(colour.train.sample(None, 0)[0], grey.train.sample(None, 0)[0].expand(3, -1, -1))
    cfg = DataConfig(name="synthetic", synthetic_samples=4, image_size=(8, 8))
    rgb = build_data(cfg, seed=0)
    luma = build_data(DataConfig(name="synthetic", synthetic_samples=4, image_size=(8, 8), channels=1), seed=0)
    assert (rgb.channels, luma.channels, luma.mean) == (3, 1, (pytest.approx(0.5),))
    expected = np.array(Image.fromarray(rgb.train.image(2)).convert("L"))
    assert np.array_equal(luma.train.image(2)[..., 0], expected)


def test_small_images_are_scaled_bicubically() -> None:
    small = build_data(DataConfig(image_size=(8, 8), limit=2), seed=0).train.image(1)[..., 0]
    large = build_data(DataConfig(image_size=(12, 20), limit=2), seed=0).train.image(1)[..., 0]
    assert np.array_equal(large, np.array(Image.fromarray(small).resize((20, 12), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"holdout": 1437}, r"none of the 1437 training images"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_data(DataConfig(**values), seed=0)
