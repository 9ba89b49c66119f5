"""Real training jobs in which one rank fails on purpose: started, awaited, timed.

python tests/distributed/faults.py      prints a table: fault, launcher, seconds, status, last checkpoint, message
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pool import free_port

sys.path.append(str(Path(__file__).parents[1]))
from micro import MICRO

from swinmoe.checkpoint import latest_checkpoint, load_checkpoint

ROOT = Path(__file__).parents[2]
STEPS, SAVED, BROKEN = 10, 4, 9
"""A job's length, how often it saves, and the step that the fault strikes: the last checkpoint is that of step 8."""
IMPATIENT = 0.1
"""Minutes that a collective may take, where a test waits for that to pass."""
RUN: dict[str, dict[str, Any]] = {
    "model": {
        **MICRO,
        "drop_path_rate": 0.1,
        "moe": {"num_experts": 4, "top_k": 2},
    },
    "data": {"name": "digits", "limit": 128},
    "optim": {"base_lr": 0.003},
    "train": {"steps": STEPS, "epochs": None, "batch_size": 32},
    "checkpoint": {"every_steps": SAVED, "every_epochs": 0, "keep_last": 9},
    "log": {"every_steps": 1, "peak_flops": 1e11},
    "parallel": {"ep_size": 2},
}


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    status: int
    stderr: str
    seconds: float
    """Since its start."""


def write_config(folder: Path) -> Path:
    """The config of every job here."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    return path


def start(
    launcher: Sequence[str], folder: Path, name: str, *overrides: str, fault: str = "", rank: int = 1
) -> subprocess.Popen[str]:
    """Start `swinmoe train` of the config in `folder` under `launcher` (a script and its options)."""
    extra = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"}
    if fault:
        python = folder / "faulty-python"
        if not python.exists():
            faulty = Path(__file__).with_name("faulty.py")
            python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(faulty))} "$@"\n')
            python.chmod(0o755)
        extra |= {"FAULT": fault, "FAULT_RANK": str(rank), "FAULT_STEP": str(BROKEN)}
        # torchrun starts its workers by a variable of its own.
        extra["PYTHON_EXEC" if "torchrun" in launcher[0] else "PYTHON"] = str(python)
    return subprocess.Popen(
        [*launcher, "train", str(folder / "run.yaml"), f"output_dir={folder}", f"name={name}", *overrides],
        env=os.environ | extra,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def await_end(jobs: Sequence[subprocess.Popen[str]], timeout: float = 400.0) -> list[Ended]:
    """How each ended; `subprocess.TimeoutExpired`, and an end for all of them, after `timeout` seconds."""
    began = time.monotonic()
    ended = []
    try:
        for job in jobs:
            _, stderr = job.communicate(timeout=max(0.1, timeout + began - time.monotonic()))
            ended.append(Ended(job.returncode, stderr, time.monotonic() - began))
    finally:
        for job in jobs:
            if job.poll() is None:
                os.killpg(job.pid, 9)
                job.communicate()
    return ended


def local(*options: str) -> list[str]:
    """launch/local.sh with two processes."""
    return [str(ROOT / "launch" / "local.sh"), "--processes", "2", "--cpu", *options]


def agents(*options: str) -> list[list[str]]:
    """launch/torchrun.sh twice, as on two machines with one process each."""
    script, head = str(ROOT / "launch" / "torchrun.sh"), f"127.0.0.1:{free_port()}"
    return [[script, "--nodes", "2", "--head", head, "--per-node", "1", *options]] * 2


def last_saved(folder: Path, name: str) -> int | None:
    """The step of the newest checkpoint, read whole and held against its hashes; None if there is none."""
    path = latest_checkpoint(folder / name / "checkpoints")
    return None if path is None else load_checkpoint(path).step


def own_words(stderr: str) -> list[str]:
    """What swinmoe and its launcher scripts said, without torchrun's report."""
    return [line for line in stderr.splitlines() if line.startswith(("swinmoe: ", "launch/"))]


def _table() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_config(folder)
        for fault in ("kill", "raise", "config", "stop"):
            for how in ("local.sh", "torchrun.sh, 2 agents"):
                name = f"{fault}-{how[:5]}"
                launchers = [local()] if how == "local.sh" else agents()
                impatient = f"parallel.timeout_minutes={IMPATIENT}"
                jobs = [start(launcher, folder, name, impatient, fault=fault) for launcher in launchers]
                ended = await_end(jobs)
                stamp = folder / name / "records.jsonl"
                # From the last record, the step's before the fault; a refused run leaves none: from its start.
                seconds = time.time() - stamp.stat().st_mtime if stamp.exists() else max(e.seconds for e in ended)
                words = [line for e in ended for line in own_words(e.stderr)]
                saved = last_saved(folder, name)
                statuses = [e.status for e in ended]
                print(f"| {fault} | {how} | {seconds:.1f} | {statuses} | {saved} | {' / '.join(words)} |", flush=True)


if __name__ == "__main__":
    _table()
