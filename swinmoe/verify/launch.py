"""Several processes on this machine, for a command that was started as one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0
"""For the others, once one has failed: they may be about to say why."""


def run_on(processes: int, argv: Sequence[str]) -> int:
    """Run `swinmoe *argv` in so many gloo processes on the CPU; the status of the first to fail, or 0.

    Rank 0 talks to the terminal. What the others said is shown if one of them failed and rank 0 did not say why.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes))),
    }
    with tempfile.TemporaryDirectory(prefix="swinmoe-verify-") as folder:
        said: list[IO[str]] = []
        children: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(processes):
                said.append(open(os.path.join(folder, f"rank{rank}"), "w+", encoding="utf-8"))  # noqa: SIM115
                children.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "swinmoe.cli", *argv],
                        env=os.environ | job | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=said[rank] if rank else None,
                        stderr=said[rank] if rank else None,
                    )
                )
            failed = _first_failure(children)
            if failed is not None and children[0].poll() in (None, 0):
                said[failed].seek(0)
                sys.stderr.write(f"process {failed} of {processes} failed:\n{said[failed].read()}")
            return 0 if failed is None else children[failed].returncode
        finally:
            _end(children)
            for file in said:
                file.close()


def _first_failure(children: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all; the rank that failed first, as soon as the others have had a moment to end by themselves."""
    while True:
        states = [child.poll() for child in children]
        failed = next((rank for rank, state in enumerate(states) if state), None)
        if failed is not None:
            until = time.monotonic() + _GRACE_SECONDS
            while time.monotonic() < until and any(child.poll() is None for child in children):
                time.sleep(_POLL_SECONDS)
            return failed
        if all(state == 0 for state in states):
            return None
        time.sleep(_POLL_SECONDS)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
    for child in children:
        child.wait()
