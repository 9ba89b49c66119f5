"""Small data sets on disk, and a check that global random state is left alone."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def rng_untouched() -> Callable[[], AbstractContextManager[None]]:
    """A context in which Python's, numpy's and torch's global generators must not move."""

    @contextmanager
    def check() -> Iterator[None]:
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        yield
        assert random.getstate() == before[0]
        after = np.random.get_state()
        assert all(np.array_equal(a, b) for a, b in zip(after, before[1], strict=True))
        assert torch.equal(torch.get_rng_state(), before[2])

    return check


def _idx_bytes(array: np.ndarray) -> bytes:
    """The idx encoding of an array of bytes, written out by hand."""
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def idx_bytes() -> Callable[[np.ndarray], bytes]:
    return _idx_bytes


@pytest.fixture
def fashion_folder(tmp_path: Path) -> Path:
    """A Fashion-MNIST lookalike of 40 training and 12 test images: two files gzipped, two plain."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "fashion"
    folder.mkdir()
    for stem, count in (("train", 40), ("t10k", 12)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(_idx_bytes(images)))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(_idx_bytes(labels))
    return folder


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """root/{train,val}/{cat,dog}: RGB, grey and palette PNGs of several sizes; 6 training and 4 validation images."""
    rng = np.random.default_rng(1)
    root = tmp_path / "photos"
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = 40 + 7 * number, 61 - 5 * number
                image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
                image.convert(("RGB", "L", "P")[number]).save(folder / f"{number}.png")
    return root


def _labelled(folder: Path) -> list[tuple[Path, int]]:
    """The pictures of a class folder in the order in which data.name=folder lists them, with their labels."""
    names = sorted(path.name for path in folder.iterdir())
    return [(path, label) for label, name in enumerate(names) for path in sorted((folder / name).iterdir())]


@pytest.fixture
def zip_root(image_folder: Path, tmp_path: Path) -> Path:
    """`image_folder` as zip + map: training deflated, evaluation stored, with members that no map names."""
    root = tmp_path / "zips"
    root.mkdir()
    for split, method in (("train", zipfile.ZIP_DEFLATED), ("val", zipfile.ZIP_STORED)):
        lines = []
        with zipfile.ZipFile(root / f"{split}.zip", "w", method) as archive:
            archive.writestr("README", "not a picture")
            for path, label in reversed(_labelled(image_folder / split)):
                inner = str(path.relative_to(image_folder / split))
                archive.write(path, inner)
                lines.append(f"{inner}\t{label}\n")
        (root / f"{split}_map.txt").write_text("".join(reversed(lines)))
    return root


@pytest.fixture
def tar_root(image_folder: Path, tmp_path: Path) -> Path:
    """`image_folder` as tar shards: labels by turns in .cls and .json, with members of other kinds."""
    root = tmp_path / "tars"
    root.mkdir()
    for split in ("train", "val"):
        samples = _labelled(image_folder / split)
        for shard in range(2):
            with tarfile.open(root / f"{split}-{shard:06}.tar", "w") as tar:
                half = len(samples) // 2
                for number, (path, label) in enumerate(samples[shard * half : (shard + 1) * half]):
                    key = f"./{split}/{number:04}"
                    add_member(tar, f"{key}.txt", b"a caption")
                    add_member(tar, f"{key}.png", path.read_bytes())
                    if number % 2:
                        add_member(tar, f"{key}.json", json.dumps({"label": label, "url": "nowhere"}).encode())
                    else:
                        add_member(tar, f"{key}.cls", f"{label}\n".encode())
    return root


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def put() -> Callable[[tarfile.TarFile, str, bytes], None]:
    """Adds a member to a tar archive."""
    return add_member
