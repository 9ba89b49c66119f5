from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from swinmoe.config import AugmentConfig, DataConfig
from swinmoe.data import build_data
from swinmoe.data.folder import IMAGENET_MEAN, IMAGENET_STD
from swinmoe.data.transforms import resize_and_crop
from swinmoe.errors import DataError


def _cfg(root: Path | None, **values) -> DataConfig:
    return DataConfig(name="folder", root=None if root is None else str(root), image_size=(32, 32), **values)


def test_images_labels_and_the_evaluation_view_are_torchvisions(image_folder: Path) -> None:
    bundle = build_data(_cfg(image_folder), seed=0)
    assert (len(bundle.train), len(bundle.eval), bundle.eval_split) == (6, 4, "val")
    assert (bundle.num_classes, bundle.channels, bundle.class_names) == (2, 3, ("cat", "dog"))
    assert bundle.eval.targets.tolist() == [0, 0, 1, 1]
    view = transforms.Compose(
        [
            transforms.Resize(round(32 * 256 / 224), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    for index, name in enumerate(["cat/0", "cat/1", "dog/0", "dog/1"]):
        with Image.open(image_folder / "val" / f"{name}.png") as image:
            expected = view(image.convert("RGB"))
        torch.testing.assert_close(bundle.eval.sample(None, index)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(100, 300), (300, 100), (57, 56), (224, 224), (500, 375), (10, 11)])
def test_resize_and_crop_is_the_256_of_224_rule(shape: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    rule = transforms.Compose(
        [transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    )
    assert np.array_equal(np.array(resize_and_crop(image, (224, 224))), np.array(rule(image)))


@pytest.mark.parametrize("shape", [(80, 30), (30, 80), (64, 32)])
def test_a_rectangle_is_covered_without_distortion(shape: tuple[int, int]) -> None:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    image = Image.fromarray(np.stack([rows * 2, columns * 2, columns * 0], -1).astype(np.uint8))
    view = np.array(resize_and_crop(image, (48, 24))).astype(float)
    assert view.shape == (48, 24, 3)
    slopes = view[-6, 12, 0] - view[5, 12, 0], view[24, -6, 1] - view[24, 5, 1]
    assert slopes[0] / 37 == pytest.approx(slopes[1] / 13, rel=0.1)


def test_a_holdout_needs_no_validation_folder(image_folder: Path) -> None:
    shutil.rmtree(image_folder / "val")
    with pytest.raises(DataError, match=r"neither a folder 'val' nor 'test'.*data\.holdout"):
        build_data(_cfg(image_folder), seed=0)
    bundle = build_data(_cfg(image_folder, holdout=2), seed=0)
    assert (len(bundle.train), len(bundle.eval), bundle.eval_split) == (4, 2, "holdout")


def test_test_is_used_where_there_is_no_val(image_folder: Path) -> None:
    (image_folder / "val").rename(image_folder / "test")
    assert build_data(_cfg(image_folder), seed=0).eval_split == "test"


def test_wrong_layouts_are_named(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs data\.root"):
        build_data(_cfg(None), seed=0)
    with pytest.raises(DataError, match="does not exist"):
        build_data(_cfg(tmp_path / "absent"), seed=0)
    with pytest.raises(DataError, match="has no folder 'train'"):
        build_data(_cfg(image_folder / "train"), seed=0)
    (image_folder / "val" / "dog").rename(image_folder / "val" / "wolf")
    with pytest.raises(DataError, match="2 are in one of them only: dog, wolf"):
        build_data(_cfg(image_folder), seed=0)
    (image_folder / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        build_data(_cfg(image_folder), seed=0)


def test_a_damaged_image_is_named_when_it_is_met(image_folder: Path) -> None:
    (image_folder / "val" / "cat" / "1.png").write_bytes(b"\x89PNG broken")
    bundle = build_data(_cfg(image_folder), seed=0)
    bundle.eval.sample(None, 0)
    with pytest.raises(DataError, match=r"val/cat/1\.png cannot be decoded"):
        bundle.eval.sample(None, 1)


def test_grey_by_request(image_folder: Path) -> None:
    augment = AugmentConfig(random_resized_crop=(0.3, 1.0), horizontal_flip=0.5)
    bundle = build_data(_cfg(image_folder, channels=1, augment=augment), seed=0)
    assert bundle.train.sample(0, 0)[0].shape == (1, 32, 32)
    assert bundle.mean == pytest.approx((0.299 * 0.485 + 0.587 * 0.456 + 0.114 * 0.406,))
    assert bundle.eval.image(0).shape == (32, 32, 3)
