"""`swinmoe evaluate` on two processes finds what one finds; what cannot be shared is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from micro import MICRO

from swinmoe.commands import evaluate
from swinmoe.config import RunConfig
from swinmoe.config.io import build
from swinmoe.train import train

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
RUN: dict[str, Any] = {
    "name": "run",
    "model": {**MICRO, "num_classes": 10, "moe": {"num_experts": 4, "top_k": 2}},
    "data": {"name": "digits", "limit": 101},
    "train": {"steps": 2, "epochs": None, "batch_size": 32, "eval_batch_size": 30, "eval_every_epochs": None},
    "log": {"every_steps": 2, "peak_flops": 1e11},
}


def _launch(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "launch" / "local.sh"), "--processes", "2", *map(str, words)],
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    run, _ = train(build(RunConfig, {**RUN, "output_dir": str(tmp_path)}), show=False)
    evaluate.run(run, [], which="auto", capacity="dropless", out=tmp_path / "one")
    done = _launch("evaluate", run, "--capacity", "dropless", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("expected calibration error") == 1
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for key in ("accuracy", "top5", "classes", "data", "drop_fraction"):
        assert one[key] == two[key], key
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    for layer, numbers in one["routing"].items():
        assert two["routing"][layer]["routed"] == numbers["routed"]
    assert one["capacity"][0]["routed"] == two["capacity"][0]["routed"] > 0
    refused = _launch("fewshot", run)
    assert refused.returncode == 2 and "runs on one process, and was started on 2" in refused.stderr
