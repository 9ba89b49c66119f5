"""From a picture to what the model sees: the plain transform of evaluation, and training's augmentations.

b images, C channels (1 or 3), H height, W width; pictures are PIL images of mode L (C = 1) or RGB (C = 3)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from swinmoe.config import AugmentConfig
from swinmoe.data.draws import isolated_rng, uniforms
from swinmoe.errors import ConfigError
from swinmoe.randomness import derive_seed

Size = tuple[int, int]
_MODES = {1: "L", 3: "RGB"}
_DRAWS = 3  # crop row, crop column, flip


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """`image` as grey (ITU-R 601 luma) or RGB."""
    mode = _MODES[channels]
    return image if image.mode == mode else image.convert(mode)


def resize(image: Image.Image, size: Size) -> Image.Image:
    """Bicubic, with PIL's integer arithmetic: the same bits on every machine."""
    return image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.BICUBIC)


def resize_and_crop(image: Image.Image, size: Size) -> Image.Image:
    """The usual evaluation view: scale until 224/256 of the shorter fit is covered, then cut the centre out."""
    width, height = image.size
    goal = tuple(round(side * 256 / 224) for side in size)
    if goal[0] * width >= goal[1] * height:  # the height binds
        scaled = (goal[0], goal[0] * width // height)
    else:
        scaled = (goal[1] * height // width, goal[1])
    image = resize(image, scaled)
    top, left = round((scaled[0] - size[0]) / 2), round((scaled[1] - size[1]) / 2)
    return image.crop((left, top, left + size[1], top + size[0]))


def pixels(image: Image.Image) -> Tensor:
    """(C, H, W) uint8 of a picture of mode L or RGB."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


class Normalise:
    """uint8 (*, C, H, W) -> float32 of the same shape, (value/255 - mean)/std per channel.

    Each step is one elementwise operation, rounded by itself, so that an image has the same bits alone and in a batch.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self._mean = torch.tensor(mean).view(-1, 1, 1)
        self._std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)


class Augment:
    """Training's random transforms. Every draw depends on (seed, epoch, sample index) and on nothing else.

    In order: random resized crop, padded crop, flip, RandAugment or colour jitter, normalise, random erasing.
    """

    def __init__(
        self, cfg: AugmentConfig, *, size: Size, mean: tuple[float, ...], normalise: Normalise, seed: int
    ) -> None:
        self._cfg = cfg
        self._size = size
        self._seed = seed
        self._normalise = normalise
        self._resized_crop = _random_resized_crop(cfg, size)
        self._colours = _rand_augment(cfg, size, mean) or _color_jitter(cfg)
        self._erase = _random_erasing(cfg)

    @property
    def vectorised(self) -> bool:
        """Whether `batch` does all that the configuration asks for."""
        return self._resized_crop is None and self._colours is None and self._erase is None

    def sample(self, image: Image.Image, fit: Callable[[Image.Image], Image.Image], epoch: int, index: int) -> Tensor:
        """(C, H, W) float32: one picture, augmented and normalised.

        Args:
            image: the whole picture.
            fit: brings it to (H, W) where no random resized crop does.
            epoch, index: what the draws depend on, besides the seed.
        """
        if self.vectorised:
            return self._finish(self._move(fit(image), epoch, index))
        with isolated_rng(derive_seed("augment", self._seed, epoch, index)):
            image = self._resized_crop(image) if self._resized_crop else fit(image)
            image = self._move(image, epoch, index)
            if self._colours:
                image = self._colours(image)
            return self._finish(image)

    def batch(self, images: Tensor, epoch: int, indices: npt.NDArray[np.int64]) -> Tensor:
        """(b, C, H, W) float32 from uint8 of that shape: `sample` for many, where `vectorised`."""
        rows, columns, flips = self._draws(epoch, indices)
        b, _, H, W = images.shape
        pad = self._cfg.crop_padding
        if pad:
            padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
            views = padded.unfold(2, H, 1).unfold(3, W, 1)  # (b, C, 2·pad+1, 2·pad+1, H, W), nothing copied
            images = views[torch.arange(b), :, torch.from_numpy(rows), torch.from_numpy(columns)]
        if flips.any():
            images = torch.where(torch.from_numpy(flips).view(b, 1, 1, 1), images.flip(-1), images)
        return self._normalise(images)

    def _draws(
        self, epoch: int, indices: Any
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Row and column offsets in the padded image, and whether to flip; each (b,)."""
        u = uniforms(derive_seed("crop", self._seed, epoch), indices, _DRAWS)
        offsets = (u[:, :2] * (2 * self._cfg.crop_padding + 1)).astype(np.int64)
        return offsets[:, 0], offsets[:, 1], u[:, 2] < self._cfg.horizontal_flip

    def _move(self, image: Image.Image, epoch: int, index: int) -> Image.Image:
        rows, columns, flips = self._draws(epoch, [index])
        pad, (H, W) = self._cfg.crop_padding, self._size
        if pad:
            top, left = int(rows[0]), int(columns[0])
            image = ImageOps.expand(image, pad).crop((left, top, left + W, top + H))
        return ImageOps.mirror(image) if flips[0] else image

    def _finish(self, image: Image.Image) -> Tensor:
        tensor = self._normalise(pixels(image))
        return self._erase(tensor) if self._erase else tensor


def _random_resized_crop(cfg: AugmentConfig, size: Size) -> Callable[[Image.Image], Image.Image] | None:
    if cfg.random_resized_crop is None:
        return None
    from torchvision.transforms import InterpolationMode, RandomResizedCrop

    crop: Callable[[Image.Image], Image.Image] = RandomResizedCrop(
        size, scale=cfg.random_resized_crop, interpolation=InterpolationMode.BICUBIC
    )
    return crop


def _rand_augment(
    cfg: AugmentConfig, size: Size, mean: tuple[float, ...]
) -> Callable[[Image.Image], Image.Image] | None:
    if cfg.rand_augment is None:
        return None
    from timm.data import auto_augment

    fill = tuple(round(255 * value) for value in mean)
    settings = {
        "translate_const": int(min(size) * 0.45),
        "img_mean": fill if len(fill) > 1 else fill[0],
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        if not cfg.rand_augment.startswith("rand"):
            raise ValueError("it does not start with 'rand'")
        augment = auto_augment.rand_augment_transform(cfg.rand_augment, settings)
    except (AssertionError, ValueError, KeyError) as error:
        raise ConfigError(
            f"data.augment.rand_augment={cfg.rand_augment!r} is not a RandAugment that timm knows "
            f"({error or 'unknown part'}); use e.g. rand-m9-mstd0.5-inc1, or null"
        ) from error
    for op in augment.ops:
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = _posterize
    transform: Callable[[Image.Image], Image.Image] = augment
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keeps at least one bit: timm may ask for none, which Pillow 13 refuses and older ones paint black."""
    return ImageOps.posterize(image, min(max(bits, 1), 8))


def _color_jitter(cfg: AugmentConfig) -> Callable[[Image.Image], Image.Image] | None:
    if not cfg.color_jitter:
        return None
    from torchvision.transforms import ColorJitter

    strength = cfg.color_jitter
    jitter: Callable[[Image.Image], Image.Image] = ColorJitter(strength, strength, strength)
    return jitter


def _random_erasing(cfg: AugmentConfig) -> Callable[[Tensor], Tensor] | None:
    if not cfg.random_erasing:
        return None
    from timm.data.random_erasing import RandomErasing

    # One rectangle of normal noise per erased image, as in DeiT and Swin.
    erase: Callable[[Tensor], Tensor] = RandomErasing(cfg.random_erasing, mode="pixel", device="cpu")
    return erase
