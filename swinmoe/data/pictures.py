"""Pictures that a person names, prepared as a trained model saw its data.

Shapes: n pictures, C channels (1 or 3), H height, W width
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from swinmoe.config import DataConfig
from swinmoe.data.build import build_data
from swinmoe.data.folder import IMAGENET_MEAN, IMAGENET_STD
from swinmoe.data.transforms import Normalise, pixels, resize, resize_and_crop, to_channels
from swinmoe.errors import DataError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_PHOTOGRAPHS = ("folder", "tar", "zip")


def find_pictures(paths: Iterable[Path | str]) -> list[Path]:
    """Files as they are, folders as the pictures anywhere in them, by name.

    Raises:
        DataError: a path that does not exist, or a folder without pictures.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise DataError(f"{str(path)!r} holds no picture; known kinds are {', '.join(SUFFIXES)}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{str(path)!r} does not exist; give pictures, or folders of pictures")
    return found


@dataclass(frozen=True)
class Preparation:
    """How a data set's pictures become a model's input, and what its classes are called."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    photographs: bool
    """Scaled and cropped as photographs are, or squeezed into the size as small ready-made images are."""
    class_names: tuple[str, ...] | None
    """None where the data set is not at hand."""

    def picture(self, path: Path) -> Image.Image:
        """What the model sees of a file, before normalisation, of mode L or RGB.

        Raises:
            DataError: no picture, or a damaged one.
        """
        try:
            with Image.open(path) as file:
                whole = to_channels(file.convert("RGB"), len(self.mean))
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"picture {str(path)!r} cannot be decoded ({error})") from error
        return resize_and_crop(whole, self.size) if self.photographs else resize(whole, self.size)

    def tensor(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(n, C, H, W) float32, normalised."""
        normalise = Normalise(self.mean, self.std)
        return torch.stack([normalise(pixels(picture)) for picture in pictures])

    def name(self, index: int) -> str:
        """A class by its name, or by its number."""
        names = self.class_names
        return names[index] if names is not None and index < len(names) else f"class {index}"


def preparation(cfg: DataConfig) -> Preparation:
    """That of a configuration's data set; without the data at hand, class folders are taken for ImageNet's like.

    Raises:
        DataError: a data set that is not here and whose normalisation is its own.
    """
    try:
        bundle = build_data(cfg, seed=0)
    except DataError:
        if cfg.name not in _PHOTOGRAPHS:
            raise
        return Preparation(cfg.image_size, IMAGENET_MEAN, IMAGENET_STD, True, None)
    photographs = cfg.name in _PHOTOGRAPHS
    return Preparation(cfg.image_size, bundle.mean, bundle.std, photographs, bundle.class_names)
