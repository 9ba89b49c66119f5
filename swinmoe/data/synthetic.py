"""Pictures made up on the spot, for tests and throughput runs: learnable, deterministic, of any size and class count.

A class is a grating of its own orientation, spacing and tint; where it lies, its phase and the noise on it differ from
image to image.

n images of a chunk, H height, W width
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from swinmoe.config import DataConfig
from swinmoe.data.source import ArraySource, RawData
from swinmoe.errors import ConfigError
from swinmoe.randomness import derive_seed

_ORIENTATIONS = 8
_CHUNK = 64
"""Images made at once, which bounds the memory for intermediate values."""


def load_synthetic(cfg: DataConfig) -> RawData:
    """`synthetic_samples` training images and a quarter as many test images, RGB, at `image_size`."""
    if cfg.synthetic_samples < 1 or cfg.synthetic_classes < 1:
        raise ConfigError(
            f"data.synthetic_samples={cfg.synthetic_samples} and data.synthetic_classes={cfg.synthetic_classes} must "
            "both be at least 1"
        )
    classes = cfg.synthetic_classes
    return RawData(
        train=_make("train", cfg.synthetic_samples, classes, cfg.image_size),
        eval=_make("test", max(1, cfg.synthetic_samples // 4), classes, cfg.image_size),
        eval_split="test",
        class_names=tuple(f"class {number}" for number in range(classes)),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )


def _make(split: str, count: int, classes: int, size: tuple[int, int]) -> ArraySource:
    """(count, H, W, 3) images; image i is of class i mod `classes`, so that any prefix is balanced."""
    targets = np.arange(count) % classes
    images = np.empty((count, *size, 3), dtype=np.uint8)
    for start in range(0, count, _CHUNK):
        chunk = targets[start : start + _CHUNK]
        # Seeded by the chunk, not by the run: the data set is the same for every seed of an experiment.
        rng = np.random.default_rng(derive_seed("synthetic", split, classes, *size, start))
        images[start : start + _CHUNK] = _draw(rng, chunk, size)
    return ArraySource(images, torch.from_numpy(targets).long())


def _draw(rng: np.random.Generator, targets: npt.NDArray[np.int64], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    n = len(targets)
    angle = (math.pi * (targets % _ORIENTATIONS) / _ORIENTATIONS)[:, None, None]
    waves = (3 + targets // _ORIENTATIONS % 4)[:, None, None]
    # The golden ratio spreads the tints of neighbouring classes far apart on the colour circle.
    hue = 2 * math.pi * (targets * 0.6180339887498949 % 1)
    tint = 0.5 + 0.5 * np.cos(hue[:, None] + 2 * math.pi * np.arange(3) / 3)
    y = np.linspace(-1, 1, size[0])[None, :, None]
    x = np.linspace(-1, 1, size[1])[None, None, :]
    cy, cx = rng.uniform(-0.3, 0.3, (2, n, 1, 1))
    phase = rng.uniform(0, 2 * math.pi, (n, 1, 1))
    along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    blob = np.exp(-2 * ((x - cx) ** 2 + (y - cy) ** 2))
    pattern = (np.sin(math.pi * waves * along + phase) * blob)[..., None] * (0.4 + 0.6 * tint)[:, None, None, :]
    noise = rng.normal(0, 0.15, (n, *size, 3))
    shade: npt.NDArray[np.float64] = np.clip(0.5 + 0.45 * pattern + noise, 0, 1)
    return np.rint(255 * shade).astype(np.uint8)
