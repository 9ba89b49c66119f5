"""`swinmoe train` started by launch/local.sh: experts spread over two processes give one process's checkpoint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from micro import MICRO

from swinmoe.checkpoint import latest_checkpoint, load_checkpoint
from swinmoe.checkpoint.naming import num_experts
from swinmoe.records import read_records

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
RUN = {
    "model": {
        **MICRO,
        "drop_path_rate": 0.0,
        "moe": {"num_experts": 4, "top_k": 2, "router": {"bias_update_rate": 0.01}},
    },
    "data": {"name": "digits", "limit": 250},
    "optim": {"base_lr": 0.003, "clip_grad_norm": 0.2},
    "train": {"steps": 6, "epochs": None, "batch_size": 32, "accumulation": 2, "ema_decay": 0.9, "precision": "fp64"},
    "checkpoint": {"every_steps": 3, "every_epochs": 0, "keep_last": 9},
    "log": {"every_steps": 3, "peak_flops": 1e11},
}


def _train(folder: Path, name: str, processes: int, *overrides: str) -> None:
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(RUN))
    argv = ["train", str(config), f"output_dir={folder}", f"name={name}", *overrides]
    _launch(processes, *argv)


def _launch(processes: int, *argv: str) -> None:
    done = subprocess.run(
        [str(ROOT / "launch" / "local.sh"), "--processes", str(processes), *argv],
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def _furthest(a: Path, b: Path) -> float:
    """Largest difference between two runs' last checkpoints: weights, moments and averages."""
    ends = [latest_checkpoint(folder / "checkpoints") for folder in (a, b)]
    ours, theirs = (load_checkpoint(end).tensors for end in ends if end is not None)
    assert ours.keys() == theirs.keys() == {"model", "optimizer", "average"}
    worst = 0.0
    for file, tensors in ours.items():
        assert tensors.keys() == theirs[file].keys()
        for name, tensor in tensors.items():
            assert tensor.shape == theirs[file][name].shape, name
            worst = max(worst, float((tensor.double() - theirs[file][name].double()).abs().max()))
    return worst


def test_two_processes_write_the_checkpoint_of_one(tmp_path: Path) -> None:
    _train(tmp_path, "one", 1)
    _train(tmp_path, "two", 2, "parallel.ep_size=2")
    assert _furthest(tmp_path / "one", tmp_path / "two") < 1e-10
    # Half way on two processes, the rest on one: a checkpoint does not know how many wrote it.
    halves = tmp_path / "halves" / "checkpoints"
    shutil.copytree(tmp_path / "two" / "checkpoints" / "step-00000003", halves / "step-00000003")
    shutil.copy(tmp_path / "two" / "records.jsonl", tmp_path / "halves")
    _train(tmp_path, "halves", 1, "resume=auto")
    assert _furthest(tmp_path / "one", tmp_path / "halves") < 1e-10
    weights = load_checkpoint(halves / "step-00000006").tensors["model"]
    assert num_experts(weights) == {"layers.1.blocks.1.mlp.experts": 4}
    one, two = (read_records(tmp_path / name / "records.jsonl") for name in ("one", "two"))
    for ours, theirs in zip(one, two, strict=True):
        assert ours["kind"] == theirs["kind"]
        if ours["kind"] == "step":
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-12)
            assert ours["aux_loss"] == pytest.approx(theirs["aux_loss"], abs=1e-12)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=1e-12) and ours["grad_norm"] > 0.2
            layer = "layers.1.blocks.1.mlp"
            assert ours["routing"][layer]["routed"] == theirs["routing"][layer]["routed"]
        if ours["kind"] == "eval":  # 250 images: the ranks' shares of the last batch differ
            assert ours["count"] == theirs["count"] == 250 and ours["accuracy"] == theirs["accuracy"]


def test_sliced_experts_and_travelling_weights_leave_the_same_checkpoint(tmp_path: Path) -> None:
    """Weights, moments and averages of slices are put together again, and cut again where the run goes on."""
    few = ("model.moe.num_experts=1", "model.moe.top_k=1")
    _train(tmp_path, "one", 1, *few)
    _train(tmp_path, "sliced", 2, "parallel.ep_size=2", *few)
    assert _furthest(tmp_path / "one", tmp_path / "sliced") < 1e-10
    halves = tmp_path / "halves" / "checkpoints"
    shutil.copytree(tmp_path / "one" / "checkpoints" / "step-00000003", halves / "step-00000003")
    shutil.copy(tmp_path / "one" / "records.jsonl", tmp_path / "halves")
    _train(tmp_path, "halves", 2, "resume=auto", "parallel.ep_size=2", "parallel.weight_group=2", *few)
    assert _furthest(tmp_path / "one", tmp_path / "halves") < 1e-10


def test_a_user_error_on_two_processes_ends_with_status_2(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ep_size=3"):
        _train(tmp_path, "bad", 2, "parallel.ep_size=3", "model.moe.num_experts=6")
    assert not (tmp_path / "bad").exists()


def test_data_parallel_twins_on_two_processes(tmp_path: Path) -> None:
    """`compare` on two data-parallel processes leaves the checkpoint, for both arms, that one process leaves."""
    base = RUN | {"train": {**RUN["train"], "steps": 3}}
    twins = {"base": base, "arms": {"dense": {"model": {"moe": None}}, "sparse": {}}, "sample_images": 2}
    config = tmp_path / "twins.yaml"
    config.write_text(yaml.safe_dump(twins))
    ends = []
    for processes in (1, 2):
        _launch(processes, "compare", str(config), f"output_dir={tmp_path}", f"name=on{processes}")
        end = latest_checkpoint(tmp_path / f"on{processes}" / "checkpoints" / "seed-0")
        assert end is not None and (tmp_path / f"on{processes}" / "report.html").is_file()
        ends.append(load_checkpoint(end).tensors)
    for file, tensors in ends[0].items():
        for name, tensor in tensors.items():
            assert float((tensor.double() - ends[1][file][name].double()).abs().max()) < 1e-10, (file, name)
    tables = [
        [
            line["table"]
            for line in read_records(tmp_path / f"on{n}" / "records.jsonl")
            if line["kind"] == "class_expert"
        ]
        for n in (1, 2)
    ]
    assert tables[0] == tables[1]


def test_a_poisoned_expert_is_reported_by_all_ranks_at_once(tmp_path: Path) -> None:
    """A rate that makes weights overflow on the ranks that hold them: no rank waits for a peer that has stopped."""
    with pytest.raises(AssertionError, match="not finite at step") as stopped:
        _train(tmp_path, "wild", 2, "parallel.ep_size=2", "optim.base_lr=1e300", "optim.clip_grad_norm=null")
    assert "Timed out" not in str(stopped.value)
