"""Being asked to make room: SIGTERM and SIGUSR1 are noted, and all ranks stop after the same step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

import torch

from swinmoe.comm import all_reduce_max
from swinmoe.parallel import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take a machine away; SIGUSR1 is what Slurm's `--signal` is set to by custom."""


class StopSignals:
    """While open, signals are only noted, however often they come: a scheduler that signals a whole process group and
    a launcher that passes the signal on say it twice. Elsewhere than on the main thread, where handlers cannot be set,
    signals do what they always do."""

    def __init__(self) -> None:
        self._caught = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self, mesh: Mesh, busy: bool) -> tuple[str | None, bool]:
        """The signal that any rank has caught, and whether any is `busy`: the same on all. A collective call."""
        flags = torch.tensor([self._caught, int(busy)])  # on the host: no device waits for it
        caught, anyone_busy = all_reduce_max(flags, mesh.world_group, "agreeing on whether to stop").tolist()
        return (signal.Signals(caught).name if caught else None), bool(anyone_busy)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._caught = number
