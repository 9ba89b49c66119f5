"""Fine-tuning with frozen parts, its experts spread over two processes, gives one process's checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from micro import MICRO

from swinmoe.checkpoint import latest_checkpoint, load_checkpoint
from swinmoe.records import read_records

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
COMMON = {
    "data": {"name": "digits", "limit": 128},
    "optim": {"base_lr": 0.003, "clip_grad_norm": 0.2, "layer_decay": 0.8},
    "train": {"steps": 3, "epochs": None, "batch_size": 32, "precision": "fp64", "ema_decay": 0.5},
    "checkpoint": {"every_epochs": 0},
    "log": {"every_steps": 3, "peak_flops": 1e11},
}
PRETRAIN = COMMON | {
    "model": {
        **MICRO,
        "drop_path_rate": 0.0,
        "moe": {"num_experts": 4, "top_k": 2, "router": {"bias_update_rate": 0.01}},
    },
}
TUNE = COMMON | {"model": {"num_classes": 10}}


def _launch(folder: Path, processes: int, command: str, config: dict[str, object], name: str, *words: str) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    argv = [command, str(file), *words, f"output_dir={folder}", f"name={name}"]
    if processes > 1:
        argv.append("parallel.ep_size=2")
    done = subprocess.run(
        [str(ROOT / "launch" / "local.sh"), "--processes", str(processes), *argv],
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder / name


def _tensors(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    return load_checkpoint(path).tensors


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on two processes; fine-tuned below on one and on two."""
    return _launch(tmp_path_factory.mktemp("pre"), 2, "train", PRETRAIN, "pre")


@pytest.mark.parametrize(("policy", "travel"), [("router", 1), ("experts", 2), ("moe", 1), ("backbone", 1)])
def test_two_processes_fine_tune_as_one(pretrained: Path, tmp_path: Path, policy: str, travel: int) -> None:
    words = ("--from", str(pretrained), f"finetune.freeze={policy}")
    one = _tensors(_launch(tmp_path, 1, "finetune", TUNE, "one", *words))
    folder = _launch(tmp_path, 2, "finetune", TUNE, "two", *words, f"parallel.weight_group={travel}")
    two = _tensors(folder)
    start = _tensors(pretrained)["average"]
    assert one.keys() == two.keys()
    for group in one:
        assert one[group].keys() == two[group].keys()
        for name, tensor in one[group].items():
            assert float((tensor.double() - two[group][name].double()).abs().max()) < 1e-10, (group, name)
    (load,) = (line for line in read_records(folder / "records.jsonl") if line["kind"] == "load")
    frozen = [name for name in two["model"] if f"{name}#exp_avg" not in two["optimizer"] and "expert_bias" not in name]
    assert bool(frozen) == bool(load["frozen"]) == (policy != "none")
    for name in frozen:
        assert torch.equal(two["model"][name], start[name]) and torch.equal(two["average"][name], start[name])
