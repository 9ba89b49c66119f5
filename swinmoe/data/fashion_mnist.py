"""Fashion-MNIST: 60,000 training and 10,000 test images of clothing, 28x28 grey.

Xiao, Rasul and Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms", 2017.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from swinmoe.data.idx import read_idx
from swinmoe.data.source import ArraySource, RawData
from swinmoe.errors import DataError

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def load_fashion_mnist(root: str | None = None, *, download: bool = False) -> RawData:
    """The idx files (plain or gzipped) of `root`, or of the usual places when it is None.

    Raises:
        DataError: found nowhere (the message lists where it was sought and how to get it), or a damaged file.
    """
    places = search_places(root)
    folder = next((place for place in places if _complete(place)), None)
    if folder is None and download:
        folder = _download(Path(root) if root is not None else cache_folder())
    if folder is None:
        raise DataError(_missing(places, root))
    return RawData(
        train=_split(folder, *_STEMS[:2]),
        eval=_split(folder, *_STEMS[2:]),
        eval_split="test",
        class_names=CLASS_NAMES,
        mean=(0.2860,),
        std=(0.3530,),
    )


def cache_folder() -> Path:
    """Where downloads go when no root is given: `$XDG_CACHE_HOME/swinmoe`, by default `~/.cache/swinmoe`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swinmoe"


def search_places(root: str | None) -> list[Path]:
    """Folders that may hold the four files, in the order they are tried."""
    if root is not None:
        return [Path(root), Path(root) / "raw", Path(root) / "FashionMNIST" / "raw"]
    return [Path("data/FashionMNIST/raw"), cache_folder() / "FashionMNIST" / "raw", DEBIAN_FOLDER]


def _find(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def _complete(folder: Path) -> bool:
    return all(_find(folder, stem) for stem in _STEMS)


def _missing(places: list[Path], root: str | None) -> str:
    looked = []
    for place in places:
        absent = [f"{stem}[.gz]" for stem in _STEMS if _find(place, stem) is None]
        state = "no such folder" if not place.is_dir() else f"lacks {', '.join(absent)}"
        looked.append(f"  {place} ({state})")
    where = "in the usual places" if root is None else f"under data.root={root}"
    return "\n".join(
        [
            f"Fashion-MNIST was not found {where}; looked in",
            *looked,
            "Get it in one of these ways:",
            "  on Debian or Ubuntu: apt-get install dataset-fashion-mnist (found without further settings)",
            "  let torchvision download it: data.download=true",
            "  put the four idx files into a folder and give it as data.root=FOLDER",
        ]
    )


def _split(folder: Path, images_stem: str, labels_stem: str) -> ArraySource:
    images_path, labels_path = _find(folder, images_stem), _find(folder, labels_stem)
    assert images_path is not None
    assert labels_path is not None
    images, labels = read_idx(images_path, axes=3), read_idx(labels_path, axes=1)
    if len(images) != len(labels) or not len(images):
        raise DataError(
            f"{images_path} holds {len(images)} images but {labels_path} {len(labels)} labels; fetch both files again"
        )
    if labels.max() >= len(CLASS_NAMES):
        raise DataError(f"{labels_path} holds label {labels.max()}; Fashion-MNIST has 0 to {len(CLASS_NAMES) - 1}")
    return ArraySource(images, torch.from_numpy(labels.astype(np.int64)))


def _download(root: Path) -> Path:
    """Torchvision's download, moved into place in one piece, so that ranks that download at once do not collide."""
    from torchvision.datasets import FashionMNIST

    target = root / "FashionMNIST"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as scratch:
            FashionMNIST(scratch, download=True)
            if target.is_dir() and not _complete(target / "raw"):
                shutil.rmtree(target)
            with contextlib.suppress(OSError):  # another rank was first: its copy is as good
                (Path(scratch) / "FashionMNIST").rename(target)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"torchvision could not download Fashion-MNIST into {root} ({error}); check the network, or install the "
            "Debian package dataset-fashion-mnist, or give a folder with the four idx files as data.root"
        ) from error
    if not _complete(target / "raw"):
        raise DataError(
            f"after the download {target / 'raw'} does not hold {', '.join(_STEMS)}; remove it and try again"
        )
    return target / "raw"
