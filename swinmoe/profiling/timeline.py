"""How long a step was in each phase, forward and backward: the borders of `swinmoe.moe.phases` with the time of each.

Phases lie end to end, so that a step's times add up to the step by construction. CUDA: an event on the current stream
at every border, read once the device is through; CPU: the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from swinmoe.moe import phases

Breakdown = dict[str, dict[str, float]]
"""Pass -> phase -> milliseconds."""


class Timeline:
    """One step's borders, kept until `read`. Make one per step; give it to `phases.listen`.

    Args:
        stamp: gives the time of a border.
        between: milliseconds between two such times.
    """

    def __init__(self, stamp: Callable[[], Any], between: Callable[[Any, Any], float]) -> None:
        self._stamp, self._between = stamp, between
        self._crossed: list[tuple[str, str, Any]] = []

    def crossed(self, direction: str, phase: str) -> None:
        """A border."""
        self._crossed.append((direction, phase, self._stamp()))

    def close(self) -> None:
        """The step is over."""
        self._crossed.append(("", "", self._stamp()))

    def slices(self) -> list[tuple[str, str, Any, Any]]:
        """(pass, phase, start, end) of all that was between borders, in order."""
        ends = [when for _, _, when in self._crossed[1:]]
        return [(*mark, end) for mark, end in zip(self._crossed, ends, strict=False)]

    def read(self) -> Breakdown:
        """Milliseconds in each phase of each pass. CUDA: after the device is through with the step."""
        taken: Breakdown = {}
        for direction, phase, start, end in self.slices():
            own = taken.setdefault(direction, {})
            own[phase] = own.get(phase, 0.0) + self._between(start, end)
        return taken


def make_timeline(device: torch.device | str = "cpu") -> Timeline:
    """A timeline for work on `device`."""
    if torch.device(device).type != "cuda":
        return Timeline(time.perf_counter_ns, lambda start, end: (end - start) / 1e6)

    def stamp() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return Timeline(stamp, lambda start, end: float(start.elapsed_time(end)))


def watch(step: Callable[[], Any], device: torch.device | str = "cpu") -> Timeline:
    """Run `step` once and say what it crossed."""
    timeline = make_timeline(device)
    with phases.listen(timeline):
        step()
        timeline.close()
    return timeline
