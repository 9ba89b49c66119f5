from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets

from swinmoe.data import fashion_mnist
from swinmoe.data.fashion_mnist import DEBIAN_FOLDER, load_fashion_mnist
from swinmoe.errors import DataError


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """None of the usual places exists."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    return tmp_path


@pytest.mark.parametrize("below", ["", "raw", "FashionMNIST/raw"])
def test_a_given_root_is_searched_in_its_usual_layouts(tmp_path: Path, fashion_folder: Path, below: str) -> None:
    root = tmp_path / "root"
    shutil.copytree(fashion_folder, root / below)
    data = load_fashion_mnist(str(root))
    assert data.train.images.shape == (40, 28, 28)
    assert data.eval is not None and data.eval.targets.tolist() == [*range(10), 0, 1]
    assert (data.eval_split, len(data.class_names), data.channels) == ("test", 10, 1)


@pytest.mark.parametrize("place", ["data/FashionMNIST/raw", "cache/swinmoe/FashionMNIST/raw", "debian"])
def test_the_usual_places_are_found(nowhere: Path, fashion_folder: Path, place: str) -> None:
    shutil.copytree(fashion_folder, nowhere / place)
    assert len(load_fashion_mnist().train.targets) == 40


def test_a_missing_data_set_says_where_it_looked_and_how_to_get_it(nowhere: Path) -> None:
    (nowhere / "debian").mkdir()
    (nowhere / "debian" / "train-images-idx3-ubyte.gz").touch()
    with pytest.raises(DataError) as caught:
        load_fashion_mnist()
    text = str(caught.value)
    assert "data/FashionMNIST/raw (no such folder)" in text
    assert f"{nowhere}/cache/swinmoe/FashionMNIST/raw (no such folder)" in text
    assert f"{nowhere}/debian (lacks train-labels-idx1-ubyte[.gz], t10k-images" in text
    for way in ("apt-get install dataset-fashion-mnist", "data.download=true", "data.root=FOLDER"):
        assert way in text


def test_a_wrong_root_does_not_fall_back_to_other_places(nowhere: Path, fashion_folder: Path) -> None:
    shutil.copytree(fashion_folder, nowhere / "debian")
    with pytest.raises(DataError, match=r"under data\.root=elsewhere"):
        load_fashion_mnist("elsewhere")


def test_download_is_by_torchvision_and_lands_whole(
    nowhere: Path, fashion_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fetch(root: str, download: bool) -> None:
        calls.append(download)
        shutil.copytree(fashion_folder, Path(root) / "FashionMNIST" / "raw")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fetch)
    broken = nowhere / "cache/swinmoe/FashionMNIST/raw"
    broken.mkdir(parents=True)  # what an interrupted download would leave
    for _ in range(2):
        assert len(load_fashion_mnist(download=True).train.targets) == 40
    assert calls == [True]  # the second time it is there
    assert [path.name for path in (nowhere / "cache/swinmoe").iterdir()] == ["FashionMNIST"]


def test_a_failed_download_is_a_data_error(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(root: str, download: bool) -> None:
        raise RuntimeError("Error downloading train-images")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fail)
    with pytest.raises(DataError, match=r"could not download .*Error downloading train-images.*dataset-fashion-mnist"):
        load_fashion_mnist(str(nowhere / "new"), download=True)


def test_files_that_do_not_belong_together_are_refused(fashion_folder: Path, idx_bytes) -> None:
    labels = fashion_folder / "train-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(np.zeros(39, dtype=np.uint8)))
    with pytest.raises(DataError, match=r"40 images but .* 39 labels"):
        load_fashion_mnist(str(fashion_folder))
    labels.write_bytes(idx_bytes(np.full(40, 10, dtype=np.uint8)))
    with pytest.raises(DataError, match="label 10"):
        load_fashion_mnist(str(fashion_folder))


def test_a_truncated_file_is_refused(fashion_folder: Path) -> None:
    path = fashion_folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-5]))
    with pytest.raises(DataError, match=r"declares shape \(12, 28, 28\)"):
        load_fashion_mnist(str(fashion_folder))


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_the_real_data_set() -> None:
    data = load_fashion_mnist()
    assert data.eval is not None
    assert data.train.images.shape == (60000, 28, 28)
    assert data.eval.images.shape == (10000, 28, 28)
    assert np.bincount(data.train.targets).tolist() == [6000] * 10
    assert np.bincount(data.eval.targets).tolist() == [1000] * 10
    share = np.bincount(data.train.images.ravel(), minlength=256) / data.train.images.size
    mean = (share * np.arange(256)).sum() / 255
    assert mean == pytest.approx(data.mean[0], abs=1e-4)
    assert (share * (np.arange(256) / 255 - mean) ** 2).sum() ** 0.5 == pytest.approx(data.std[0], abs=1e-4)
