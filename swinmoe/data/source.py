"""Where images come from, before any transform: arrays in memory, files, or (in rooms beside) members of archives.

N images, h native height, w native width
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from swinmoe.errors import DataError


class ImageSource(Protocol):
    """Pictures with class ids. Opening one depends on its position alone, so any order is as good as another."""

    @property
    def targets(self) -> Tensor:
        """(N,) int64."""

    def take(self, positions: Tensor) -> Self:
        """The images at `positions` (n,), in that order."""

    def open(self, index: int) -> Image.Image:
        """Image `index`, of mode L or RGB."""


def decode(file: str | IO[bytes], name: Callable[[], str]) -> Image.Image:
    """An encoded picture as RGB; `DataError` with its name, asked for only then, if it is missing or damaged."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        reason = "it is of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"image {name()} cannot be decoded ({reason}); replace or delete it") from error


@dataclass(frozen=True)
class ArraySource:
    """Small images held in memory."""

    images: npt.NDArray[np.uint8]
    """(N, h, w) grey or (N, h, w, 3) RGB."""
    targets: Tensor
    """(N,) int64."""

    def take(self, positions: Tensor) -> ArraySource:
        """The images at `positions` (n,), in that order."""
        return ArraySource(self.images[positions.numpy()], self.targets[positions])

    def open(self, index: int) -> Image.Image:
        """Image `index`, of mode L or RGB."""
        return Image.fromarray(self.images[index])


@dataclass(frozen=True)
class FileSource:
    """Image files, decoded when asked for."""

    paths: npt.NDArray[np.bytes_]
    """(N,). One array, not a list: forked workers would copy a list of a million strings by counting references."""
    targets: Tensor
    """(N,) int64."""

    @staticmethod
    def of(paths: Sequence[str], targets: Sequence[int]) -> FileSource:
        return FileSource(np.array([os.fsencode(path) for path in paths]), torch.tensor(targets, dtype=torch.int64))

    def take(self, positions: Tensor) -> FileSource:
        """The files at `positions` (n,), in that order."""
        return FileSource(self.paths[positions.numpy()], self.targets[positions])

    def open(self, index: int) -> Image.Image:
        """File `index` as RGB; `DataError` naming the file if it is missing or damaged."""
        return decode(self.name(index), lambda: self.name(index))

    def name(self, index: int) -> str:
        """The path of file `index`."""
        return os.fsdecode(self.paths[index])


@dataclass(frozen=True)
class RawData:
    """A data set as published, before holdout, limit and channel conversion."""

    train: ImageSource
    eval: ImageSource | None
    """None where the data set has no evaluation split of its own; then `data.holdout` is needed."""
    eval_split: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel, of pixels scaled to [0, 1]; one entry for grey, three for RGB."""
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return len(self.mean)
