"""Loader processes change when batches arrive, never what is in them."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from swinmoe.config import AugmentConfig, DataConfig, MixupConfig
from swinmoe.data import Batch, TrainStream, build_data, eval_batches
from swinmoe.errors import DataError

AUGMENT = AugmentConfig(
    crop_padding=1,
    random_resized_crop=(0.3, 1.0),
    horizontal_flip=0.5,
    rand_augment="rand-m9-mstd0.5-inc1",
    random_erasing=0.5,
)
LIGHT = AugmentConfig(crop_padding=1, horizontal_flip=0.5)


def _config(workers: int, augment: AugmentConfig) -> DataConfig:
    mixup = MixupConfig(mixup=0.8, cutmix=1.0)
    return DataConfig(image_size=(12, 12), channels=3, limit=40, augment=augment, mixup=mixup, workers=workers)


def _stream(cfg: DataConfig, seed: int = 3) -> TrainStream:
    return TrainStream(
        build_data(cfg, seed=seed).train, data=cfg, batch_size=16, accumulation=2, rank=0, world=1, seed=seed,
        num_classes=10, label_smoothing=0.1,
    )  # fmt: skip


def _digest(batches: list[Batch]) -> str:
    parts = []
    for batch in batches:
        assert batch.soft_targets is not None
        parts += [batch.images, batch.targets, batch.soft_targets, batch.indices]
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def _run(workers: int, start: int, stop: int, augment: AugmentConfig = AUGMENT) -> str:
    return _digest([batch for step in _stream(_config(workers, augment)).iterate(start, stop) for batch in step])


@pytest.mark.parametrize("augment", [LIGHT, AUGMENT], ids=["light", "all"])
def test_batches_have_the_same_bits_with_0_and_2_workers_and_random_state_stays(augment: AugmentConfig) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    alone = _run(0, 0, 7, augment)  # three and a half epochs
    assert _run(2, 0, 7, augment) == alone
    assert _run(0, 1, 7, augment) != alone
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_resumed_run_in_another_process_sees_the_same_batches(tmp_path: Path) -> None:
    script = (
        "import sys, random; random.seed(99); sys.path.insert(0, sys.argv[1])\n"
        "from test_data_workers import _run\n"
        "before = random.getstate()\n"
        "print(_run(2, 3, 6))\n"
        "assert random.getstate() == before, 'a library drew from global random state when imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == _run(0, 3, 6)


def _crew(others: set[int | None]) -> set[int | None]:
    """This process's children beside `others`: the distributed tests keep a pool in the same process."""
    return {child.pid for child in multiprocessing.active_children()} - others


def test_workers_live_through_all_epochs_and_end_with_the_iterator() -> None:
    others = _crew(set())
    steps = _stream(_config(2, LIGHT)).iterate(0, 9)
    next(steps)
    crew = _crew(others)
    assert len(crew) == 2
    for _ in range(6):
        next(steps)
        assert _crew(others) == crew
    steps.close()
    assert not _crew(others)
    list(_stream(_config(2, LIGHT)).iterate(0, 3))
    assert not _crew(others)


def test_evaluation_with_workers_is_the_same() -> None:
    others = _crew(set())
    data = build_data(_config(0, LIGHT), seed=0).eval
    here = list(eval_batches(data, batch_size=7, rank=0, world=2))
    there = list(eval_batches(data, batch_size=7, rank=0, world=2, workers=2))
    assert len(here) == len(there) == 6
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.indices, b.indices) for a, b in zip(here, there, strict=True)
    )
    assert not _crew(others)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_met_by_a_worker_is_a_plain_message(tmp_path: Path, workers: int) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / split / "one" / "0.png")
    (tmp_path / "val" / "one" / "0.png").write_bytes(b"nothing")
    data = build_data(DataConfig(name="folder", root=str(tmp_path), image_size=(8, 8)), seed=0).eval
    with pytest.raises(DataError) as caught:
        list(eval_batches(data, batch_size=4, rank=0, world=1, workers=workers))
    assert "0.png cannot be decoded" in str(caught.value)
    assert "Traceback" not in str(caught.value)
