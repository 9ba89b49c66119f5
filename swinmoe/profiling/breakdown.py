"""A step's phases over many rounds and ranks, such that they still add up to the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from swinmoe.moe import phases
from swinmoe.parallel import Mesh, global_sum
from swinmoe.profiling.clock import Timing
from swinmoe.profiling.timeline import Breakdown, Timeline, watch

EXCHANGE = ("exchange_out", "exchange_back")


class Watched:
    """A step that keeps a timeline of every call."""

    def __init__(self, step: Callable[[], Any], device: torch.device | str = "cpu") -> None:
        self._step, self._device = step, device
        self.timelines: list[Timeline] = []

    def __call__(self) -> None:
        self.timelines.append(watch(self._step, self._device))


def mean_breakdown(watched: Watched, timing: Timing, mesh: Mesh, extra: tuple[str, ...] = ()) -> Breakdown:
    """Milliseconds of each phase of each pass: mean over ranks and over the middle half of the rounds.

    Medians of phases would not add up to the median of the step; means over the same rounds add up to their mean, and
    without the fastest and the slowest quarter that mean is as robust as the median. A collective call.

    Args:
        watched: the step, as it was timed.
        timing: its times, warm-up not among them.
        mesh: the ranks that stepped together.
        extra: phases besides those of expert layers.
    """
    rounds = len(timing.ms)
    order = sorted(range(rounds), key=lambda turn: timing.ms[turn])
    middle = order[rounds // 4 : rounds - rounds // 4]
    read = [watched.timelines[-rounds:][turn].read() for turn in middle]
    directions = [d for d in (phases.FORWARD, phases.BACKWARD, phases.UPDATE) if any(d in one for one in read)]
    names = {
        d: [
            n
            for n in (*phases.LAYER_PHASES, *extra, phases.OTHER)
            if d != phases.UPDATE or any(n in one.get(d, {}) for one in read)
        ]
        for d in directions
    }
    table = torch.tensor(
        [sum(one.get(d, {}).get(n, 0.0) for one in read) / len(read) for d in directions for n in names[d]],
        dtype=torch.float64,
    )
    means = iter((global_sum(table, mesh) / mesh.world).tolist())
    return {d: {n: next(means) for n in names[d]} for d in directions}


def in_exchange(breakdown: Breakdown) -> float:
    """Milliseconds that the step spends in exchanges, forward and backward: copies, launches, waiting."""
    return sum(own.get(name, 0.0) for own in breakdown.values() for name in EXCHANGE)
