"""The data sets that need no files: scikit-learn's digits and the synthetic one."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import datasets
from sklearn.linear_model import LogisticRegression

from swinmoe.config import DataConfig
from swinmoe.data import build_data
from swinmoe.data.digits import load_digits
from swinmoe.data.source import ArraySource
from swinmoe.data.synthetic import load_synthetic
from swinmoe.errors import ConfigError


def test_digits_are_all_of_scikit_learns_split_once() -> None:
    data = load_digits()
    assert isinstance(data.eval, ArraySource) and isinstance(data.train, ArraySource)
    images = np.concatenate([data.train.images, data.eval.images])
    found = datasets.load_digits()
    assert images.dtype == np.uint8
    assert np.abs(images / 255 * 16 - found.images).max() < 16 / 255
    assert (images.min(), images.max()) == (0, 255)
    targets = [*data.train.targets.tolist(), *data.eval.targets.tolist()]
    assert targets == found.target.tolist()
    assert len(data.eval.targets) == 360
    assert np.bincount(data.eval.targets).min() >= 33
    scaled = data.train.images / 255
    assert abs(scaled.mean() - data.mean[0]) < 1e-3
    assert abs(scaled.std() - data.std[0]) < 1e-3


def test_synthetic_is_the_same_each_time_and_no_two_images_are_alike() -> None:
    cfg = DataConfig(name="synthetic", synthetic_samples=70, synthetic_classes=5, image_size=(12, 20))
    data, again = load_synthetic(cfg), load_synthetic(cfg)
    assert isinstance(data.train, ArraySource) and isinstance(data.eval, ArraySource)
    assert isinstance(again.train, ArraySource)
    assert data.train.images.shape == (70, 12, 20, 3)
    assert len(data.eval.targets) == 17
    assert np.array_equal(data.train.images, again.train.images)
    both = np.concatenate([data.train.images, data.eval.images]).reshape(87, -1)
    assert len(np.unique(both, axis=0)) == 87
    assert np.bincount(data.train.targets).tolist() == [14] * 5
    assert len(data.class_names) == 5


def test_synthetic_can_be_learned() -> None:
    bundle = build_data(
        DataConfig(name="synthetic", synthetic_samples=300, synthetic_classes=6, image_size=(16, 16)), seed=0
    )

    def features(split) -> np.ndarray:
        """Orientation and spacing show in the power spectrum, wherever the grating lies."""
        images = np.stack([split.image(i) for i in range(len(split))]) / 255 - 0.5
        return np.log(np.abs(np.fft.rfft2(images, axes=(1, 2))) + 1).reshape(len(split), -1)

    model = LogisticRegression(max_iter=300).fit(features(bundle.train), bundle.train.targets)
    assert model.score(features(bundle.eval), bundle.eval.targets) > 0.8


@pytest.mark.parametrize("change", [{"synthetic_samples": 0}, {"synthetic_classes": 0}])
def test_synthetic_refuses_nothing_at_all(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        load_synthetic(DataConfig(name="synthetic", **change))
