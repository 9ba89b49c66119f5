"""The proof itself: on whole configs, between steps, in other precisions, and as a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cover import Cell, run_of
from pool import Pool

from swinmoe.config import ParallelConfig, RunConfig
from swinmoe.config.io import load, with_overrides
from swinmoe.config.shrink import shrink
from swinmoe.verify import TOLERANCE, ParallelProof, verify_parallel

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
CELL = Cell((4, 4, 4), ("tokens", None, 1), "ragged", "prioritised", "accumulation", 2, "global")


def proof_of(config: str, overrides: dict[str, Any], steps: int) -> ParallelProof:
    run = with_overrides(shrink(load(RunConfig, ROOT / "configs" / config)), overrides)
    return verify_parallel(run, steps=steps)


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        # Loss-free balance, cosine routers, an average of the weights, V2 blocks, SwiGLU: what the cover leaves out.
        ("debug/synthetic_balance.yaml", {"parallel": {"ep_size": 2}}),
        ("debug/digits_cosine_router.yaml", {"parallel": {"ep_size": 2}, "train": {"ema_decay": 0.9}}),
        ("debug/synthetic_rare_options.yaml", {"parallel": {"ep_size": 2}}),
        ("debug/digits_fine_grained.yaml", {"parallel": {"ep_size": 2, "weight_group": 2}}),
        ("debug/digits_dense_v2.yaml", {"train": {"ema_decay": 0.9}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shipped_configs_are_proven(pool2: Pool, config: str, overrides: dict[str, Any]) -> None:
    proof, other = pool2.run(proof_of, config, overrides, 4)
    assert proof == other and proof.proven, proof.failures
    assert any(name.startswith("average/") for name in proof.parameters) == ("ema_decay" in overrides.get("train", {}))
    assert len(proof.gradients) > 10 and max(proof.gradients.values()) > 0, "nothing was compared"


def in_turn() -> ParallelProof:
    flat = ParallelConfig(ep_size=4)
    ways = [
        flat,
        ParallelConfig(ep_size=4, weight_group=4),
        ParallelConfig(ep_size=4, weight_group=2),
        ParallelConfig(ep_size=4, exchange="2dh", local_size=2),
        ParallelConfig(ep_size=4, chunks=3),
    ]
    return verify_parallel(run_of(CELL), steps=10, ways=ways)


def test_tokens_and_weights_may_take_turns_between_steps(pool4: Pool) -> None:
    proof = pool4.run(in_turn)[0]
    assert proof.proven, proof.failures


def in_float32(payload: str) -> tuple[ParallelProof, ParallelProof]:
    cell = Cell((2, 2, 4), ("tokens", None, 2), "padded", "fixed", "clip", 1, "local")
    run = with_overrides(run_of(cell), {"parallel": {"payload": payload}})
    return verify_parallel(run, steps=2), verify_parallel(run, steps=2, dtype=torch.float32)


@pytest.mark.parametrize(("payload", "least", "most"), [("full", 1e-9, 1e-5), ("bf16", 1e-5, 1e-1)])
def test_float32_is_reported_as_it_trains(pool2: Pool, payload: str, least: float, most: float) -> None:
    proof, single = pool2.run(in_float32, payload)[0]
    rounded = ("parallel.payload=bf16 -> full",) if payload == "bf16" else ()
    assert proof.proven
    assert proof.set_aside == ("train.batch_size=4 -> 6", "train.precision=fp32 -> fp64", *rounded)
    assert single.dtype == "float32" and single.tolerance == TOLERANCE["float32"] and single.bit_equal
    assert single.set_aside == ("train.batch_size=4 -> 6",) and least < single.worst_gradient[1] < most


def swinmoe(*argv: str, launcher: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(launcher or (sys.executable, "-m", "swinmoe.cli")), *argv],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160", "PYTHON": sys.executable} | env,
    )


CONFIG = str(ROOT / "configs" / "debug" / "digits_swin_moe.yaml")


def test_the_command_starts_its_processes_and_proves(tmp_path: Path) -> None:
    path = tmp_path / "proof.json"
    done = swinmoe("verify", "parallel", CONFIG, "parallel.ep_size=2", "--steps", "2", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "1 x 2 (data x expert parallel), tokens travel, flat" in done.stdout
    assert "proven: every difference is at most 1e-09 in float64" in done.stdout
    assert done.stdout.count("largest relative difference") == 1, "only rank 0 speaks"
    assert "model.drop_path_rate=0.05 -> 0.0" in done.stdout
    found = json.loads(path.read_text())
    assert found["float64"]["proven"] and found["float64"]["processes"] == 2 and found["float64"]["clip_factor"] < 1
    assert found["float64"]["clip_factor"] <= found["float64"]["largest_clip_factor"] < 1
    assert "train.precision=fp32 -> fp64" in done.stdout and "clip factors: " in done.stdout
    assert found["float64"]["gradients"].keys() == found["float32"]["gradients"].keys()


def test_what_the_user_can_mend_is_said_once_with_status_2() -> None:
    done = swinmoe("verify", "parallel", CONFIG, "parallel.ep_size=2", "--processes", "3")
    assert done.returncode == 2
    assert done.stderr.count("ep_size=2 does not divide the number of processes 3") == 1, done.stderr


def test_under_a_launcher_a_mesh_that_is_not_proven_ends_with_status_1(tmp_path: Path) -> None:
    """A site module breaks the sum over DDP's ranks in every process."""
    (tmp_path / "sitecustomize.py").write_text(
        "import swinmoe.parallel.data_parallel as d\n"
        "right = d._sum_bucket\n"
        "d._sum_bucket = lambda group, bucket: right(group, bucket).then(lambda done: done.value() / 2)\n"
    )
    local = (str(ROOT / "launch" / "local.sh"), "--processes", "2")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = swinmoe("verify", "parallel", CONFIG, "--steps", "1", launcher=local, PYTHONPATH=path)
    assert done.returncode == 1, done.stderr
    assert "2 x 1 (data x expert parallel)" in done.stdout
    assert "NOT proven" in done.stdout and "the gradients' norm is off by" in done.stdout
