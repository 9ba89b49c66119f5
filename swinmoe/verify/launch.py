"""Several processes on this machine, for a command that was started as one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0
"""For the others, once one has failed: they agree on who says why (`runtime.last_word`)."""


def run_on(processes: int, argv: Sequence[str]) -> int:
    """Run `swinmoe *argv` in so many gloo processes on the CPU; the status of the first to fail, or 0.

    They share this process's terminal. One that a signal ended counts as 128 and the signal's number, as in a shell.
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
    command = [sys.executable, "-m", "swinmoe.cli", *argv]
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(subprocess.Popen(command, env=os.environ | job | own))
        status = _first_failure(children)
        return 128 - status if status < 0 else status
    finally:
        _end(children)


def _first_failure(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; 0, or the status of the first to fail, once the others have had a moment to end by themselves."""
    while True:
        states = [child.poll() for child in children]
        failed = next((state for state in states if state), None)
        if failed is not None:
            until = time.monotonic() + _GRACE_SECONDS
            while time.monotonic() < until and any(child.poll() is None for child in children):
                time.sleep(_POLL_SECONDS)
            return failed
        if all(state == 0 for state in states):
            return 0
        time.sleep(_POLL_SECONDS)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
    for child in children:
        child.wait()
