"""Gloo processes that live as long as the test session and run functions by name, so that they are started once.

    pool.run(function, *arguments) -> [result of rank 0, result of rank 1, ...]

The function must be importable (defined at the top of a test module) and is called as `function(*arguments)` in every
process, with the process group ready. Arguments and results travel pickled. Warnings are errors there too.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

COLLECTIVE_TIMEOUT_SECONDS = 60
_GRACE_SECONDS = 5.0
"""How long the other ranks may still report after one has failed: they may be waiting for it."""


class PoolError(Exception):
    """A function failed or did not return; the message holds every rank's traceback."""


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(rank: int, world: int, meeting_point: str, port: int, calls: Connection) -> None:
    """The life of one process: join, then answer calls until None comes."""
    import torch
    import torch.distributed as dist

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS),
    )
    while (call := pickle.loads(calls.recv_bytes())) is not None:
        function, arguments = call
        try:
            answer = (True, function(*arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        calls.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


class Pool:
    """`world` gloo processes on this machine, started at the first call and again after a failure."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._calls: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 90.0) -> list[Any]:
        """What `function(*arguments)` returned on each rank; `PoolError` if any rank fails or takes too long."""
        if not self._processes:
            self._start()
        message = pickle.dumps((function, arguments))
        for calls in self._calls:
            calls.send_bytes(message)
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.world and (left := deadline - time.monotonic()) > 0:
            for ready in wait([c for r, c in enumerate(self._calls) if r not in answers], left):
                rank = self._calls.index(ready)  # type: ignore[arg-type]
                try:
                    answers[rank] = pickle.loads(self._calls[rank].recv_bytes())
                except EOFError:
                    answers[rank] = (False, "the process died")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if len(answers) == self.world and all(good for good, _ in answers.values()):
            return [answers[rank][1] for rank in range(self.world)]
        self.close(kill=True)
        reports = [
            f"--- rank {rank}: {'ok' if good else answer}"
            for rank in range(self.world)
            for good, answer in [answers.get(rank, (False, "no answer in time"))]
        ]
        raise PoolError(f"{function.__name__} on {self.world} processes\n" + "\n".join(reports))

    def close(self, kill: bool = False) -> None:
        """End the processes: politely, or at once."""
        for process, calls in zip(self._processes, self._calls, strict=True):
            if kill:
                process.kill()
            else:
                calls.send_bytes(pickle.dumps(None))
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        for calls in self._calls:
            calls.close()
        self._processes, self._calls = [], []

    def _start(self) -> None:
        # A fork server imports what is slow once and forks before any thread exists: much quicker than importing per
        # process. The first optimiser step would import torch._dynamo.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "accelerate", "swinmoe.verify"])
        meeting_point = str(Path(tempfile.mkdtemp(prefix="swinmoe-pool-")) / "store")
        port = free_port()
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, meeting_point, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._calls.append(ours)
