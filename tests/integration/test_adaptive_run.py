"""A run with adaptive capacity goes on from any checkpoint as if it had never stopped, factors and records too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import MICRO
from safetensors.torch import load_file

from swinmoe.checkpoint import checkpoints
from swinmoe.config import RunConfig
from swinmoe.config.io import build
from swinmoe.records import read_records
from swinmoe.train import train

ADAPT = {"max_drop": 0.02, "floor": 0.25, "margin": 0.0, "hysteresis": 0.0, "every": 3}
RUN: dict[str, Any] = {
    "name": "run",
    "seed": 1,
    "model": {
        **MICRO,
        "img_size": 16,
        "num_classes": 10,
        "moe": {
            "num_experts": 4,
            "router": {"noise": 1.0},
            "losses": {"gshard": 0.0},
            "capacity": {"train": {"kind": "adaptive", "factor": 1.0, "adapt": ADAPT}},
        },
    },
    "data": {"name": "digits", "image_size": 16, "limit": 160},
    "optim": {"base_lr": 0.005},
    "train": {"steps": 14, "epochs": None, "batch_size": 32, "accumulation": 2, "eval_every_epochs": None},
    "checkpoint": {"every_epochs": 0, "every_steps": 4, "keep_last": 9},
    "log": {"every_steps": 2, "peak_flops": 1e11},
}
OF_THE_CLOCK = {"seconds", "images_per_second", "data_wait", "mfu", "peak_memory_bytes"}


def numbers(folder: Path) -> list[str]:
    lines = [line for line in read_records(folder / "records.jsonl") if line["kind"] in ("step", "capacity", "final")]
    return [json.dumps({k: v for k, v in line.items() if k not in OF_THE_CLOCK}, sort_keys=True) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(build(RunConfig, {**RUN, "output_dir": str(tmp_path_factory.mktemp("adaptive"))}), show=False)[0]


def test_its_factor_moves_and_is_told(whole: Path) -> None:
    records = read_records(whole / "records.jsonl")
    changes = [line for line in records if line["kind"] == "capacity"]
    assert changes and all(line["step"] % 3 == 0 for line in changes)
    (layer,) = changes[0]["layers"]
    stands = 1.0
    after = {line["step"]: line["layers"][layer]["after"] for line in changes}
    for line in (line for line in records if line["kind"] == "step"):
        for step in (line["step"] - 1, line["step"]):
            stands = after.get(step, stands)
        said = line["routing"][layer]
        assert said["capacity_factor"] == stands
        assert said["drop_fraction"] <= 0.02 and said["capacity_need"] > 0


@pytest.mark.parametrize("step", [4, 8, 12])
def test_a_resumed_run_is_the_uninterrupted_one(whole: Path, step: int, tmp_path: Path) -> None:
    """Decisions are due after steps 3, 6, 9 and 12: a checkpoint holds needs of one step, of two, or none."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for path in checkpoints(folder / "checkpoints"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    train(build(RunConfig, {**RUN, "output_dir": str(tmp_path), "resume": "auto"}), show=False)
    assert numbers(folder) == numbers(whole)
    ours, theirs = (sorted(home.rglob("step-00000014/**/*.safetensors")) for home in (folder, whole))
    assert len(ours) == len(theirs) > 0
    for own, other in zip(ours, theirs, strict=True):
        tensors = load_file(other)
        assert all(torch.equal(value, tensors[key]) for key, value in load_file(own).items())
