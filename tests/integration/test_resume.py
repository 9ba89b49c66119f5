"""A run killed with SIGKILL in mid-epoch and resumed equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from swinmoe.checkpoint import latest_checkpoint
from swinmoe.records import read_records

MODEL = {
    "preset": "swin_moe_micro",
    "in_chans": 1,
    "embed_dim": 16,
    "patch_size": 4,
    "num_heads": [1, 2],
    "drop_path_rate": 0.2,
    "moe": {
        "num_experts": 4,
        "router": {"noise": 1.0, "bias_update_rate": 0.001},
        "experts": {"dropout": 0.1},
        "losses": {"gshard": 0.01},
    },
}
RUN = {
    "model": MODEL,
    "data": {"name": "digits", "limit": 640, "augment": {"crop_padding": 2}, "mixup": {"mixup": 0.2}},
    "optim": {"base_lr": 0.002},
    "schedule": {"warmup_steps": 5},
    "train": {
        "epochs": None,
        "steps": 24,
        "batch_size": 64,
        "ema_decay": 0.9,
        "label_smoothing": 0.1,
        "accumulation": 2,
    },
    "checkpoint": {"every_steps": 5, "every_epochs": 0},
    "log": {"every_steps": 5, "peak_flops": 1e11},
}
_EVERY_NEED = {"kind": "adaptive", "adapt": {"margin": 0.0, "hysteresis": 0.0, "every": 3}}
ADAPTIVE = RUN | {"model": MODEL | {"moe": MODEL["moe"] | {"capacity": {"train": _EVERY_NEED}}}}
"""Its capacity factors are decided between checkpoints."""
COMPARE = {"base": RUN, "arms": {"dense": {"model": {"moe": None}}, "sparse": {}}, "seeds": [3], "sample_images": 2}
VOLATILE = {"seconds", "images_per_second", "data_wait", "mfu", "peak_memory_bytes"}


def _start(command: str, tree: dict, folder: Path, name: str, *overrides: str) -> subprocess.Popen:
    config = folder / f"{command}.yaml"
    config.write_text(yaml.safe_dump(tree))
    argv = [
        sys.executable,
        "-m",
        "swinmoe.cli",
        command,
        str(config),
        f"output_dir={folder}",
        f"name={name}",
        *overrides,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def _kill_in_mid_epoch(process: subprocess.Popen, checkpoints: Path, at_least: int) -> None:
    """SIGKILL once a checkpoint of at least `at_least` steps is complete; the next one is some steps away."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        found = latest_checkpoint(checkpoints)
        if found is not None and int(found.name.split("-")[1]) >= at_least:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError("no checkpoint appeared")


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    (newest,) = run.rglob("step-00000024")
    return {
        f"{file.relative_to(newest)}:{k}": v
        for file in newest.rglob("*.safetensors")
        for k, v in load_file(file).items()
    }


def _numbers(run: Path) -> list[str]:
    """What the records say of training, without what a clock has to do with."""
    lines = [
        line for line in read_records(run / "records.jsonl") if line["kind"] in ("step", "capacity", "eval", "final")
    ]
    return [json.dumps({k: v for k, v in line.items() if k not in VOLATILE}, sort_keys=True) for line in lines]


@pytest.mark.parametrize(("command", "tree", "inside"), [("train", ADAPTIVE, ""), ("compare", COMPARE, "seed-3")])
def test_killed_and_resumed_is_bit_identical(command: str, tree: dict, inside: str, tmp_path: Path) -> None:
    _finish(_start(command, tree, tmp_path, "whole"))
    _kill_in_mid_epoch(
        _start(command, tree, tmp_path, "no-workers", "resume=auto"),
        tmp_path / "no-workers" / "checkpoints" / inside,
        at_least=5,
    )
    stopped_at = latest_checkpoint(tmp_path / "no-workers" / "checkpoints" / inside)
    assert stopped_at is not None and 5 <= int(stopped_at.name.split("-")[1]) < 24
    shutil.copytree(tmp_path / "no-workers", tmp_path / "two-workers")
    key = "data.workers" if command == "train" else "base.data.workers"
    theirs = _tensors(tmp_path / "whole")
    for name, workers in (("no-workers", 0), ("two-workers", 2)):
        _finish(_start(command, tree, tmp_path, name, "resume=auto", f"{key}={workers}"))
        assert _numbers(tmp_path / name) == _numbers(tmp_path / "whole")
        ours = _tensors(tmp_path / name)
        assert ours.keys() == theirs.keys() and len(ours) > 50
        for tensor in ours:
            assert torch.equal(ours[tensor], theirs[tensor]), tensor
