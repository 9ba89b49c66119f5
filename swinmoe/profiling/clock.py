"""Steps timed against each other on all ranks: they take turns, and last as long as their slowest rank.

A machine's speed drifts over a measurement, and one outlier spoils a mean. So steps alternate within each round, their
order with it, and what is reported is the median with an interval that assumes nothing about how times are distributed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swinmoe.comm import all_reduce_max
from swinmoe.comm.all_to_all import Group

Step = Callable[[], Any]
WARM_UP = 2
"""Calls of each step that are not counted: first touches, caches, compilation."""


@dataclass(frozen=True)
class Timing:
    """How long a step took, in milliseconds."""

    ms: tuple[float, ...]
    """Of the slowest rank, round after round."""

    @property
    def median(self) -> float:
        """Half of the rounds took longer."""
        return statistics.median(self.ms)

    @property
    def low(self) -> float:
        """Lower end of the median's 95 % interval, see `median_interval`."""
        return median_interval(self.ms)[0]

    @property
    def high(self) -> float:
        """Its upper end."""
        return median_interval(self.ms)[1]

    def percentile(self, percent: float) -> float:
        """The smallest time that at least `percent` % of the rounds did not exceed (nearest rank)."""
        return sorted(self.ms)[max(0, math.ceil(percent / 100 * len(self.ms)) - 1)]

    def as_json(self) -> dict[str, float]:
        """median, low, high (ms) and rounds."""
        return {"median": self.median, "low": self.low, "high": self.high, "rounds": len(self.ms)}


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Two of `values` between which the median of their distribution lies with at least that confidence.

    Distribution-free, by order statistics: of n independent draws, the number below the median is binomial (n, 1/2), so
    [x_(k), x_(n+1-k)] misses it with probability 2·P(B < k). The narrowest such interval; below six draws no interval
    of 95 % exists, and smallest and largest are returned.
    """
    ordered, n = sorted(values), len(values)
    outside, k = 0.0, 0
    while k < n // 2:
        outside += 2 * math.comb(n, k) / 2**n
        if outside > 1 - confidence:
            break
        k += 1
    cut = max(0, k - 1)
    return ordered[cut], ordered[n - 1 - cut]


def take_turns(
    steps: Mapping[str, Step],
    rounds: int,
    *,
    group: Group = None,
    device: torch.device | str = "cpu",
    warm_up: int = WARM_UP,
    primed: bool = False,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Time `steps`, one after another in each round, in alternating order; a collective call.

    Each is first called `warm_up` times uncounted. Ranks meet before each step, and it lasts as long as on the slowest
    of them. CUDA: by events on the current stream, behind which the device is idle at the start; CPU: by the clock.

    Args:
        steps: by name; every rank gives the same names in the same order.
        rounds: at least 1.
        primed: let each step go once uncounted before it is timed, in every round: caches and the allocator are then as
            the step itself leaves them, not as the arm before did. For arms of several libraries.
        group: the ranks that step together; None = this process alone.
        device: where the work is done.
        on_round: called with the number of rounds done.
    """
    assert rounds >= 1 and steps, (rounds, steps)
    names = list(steps)
    stopwatch = _Events() if torch.device(device).type == "cuda" else _Clock()
    for step in steps.values():
        for _ in range(warm_up):
            step()
    taken = torch.empty(len(names), rounds, dtype=torch.float64)
    for turn in range(rounds):
        for index in range(len(names)) if turn % 2 == 0 else reversed(range(len(names))):
            if primed:
                steps[names[index]]()
            stopwatch.settle()
            meet(group)
            taken[index, turn] = stopwatch.time(steps[names[index]])
        if on_round is not None:
            on_round(turn + 1)
    slowest = all_reduce_max(taken, group, "comparing times")
    return {name: Timing(tuple(row)) for name, row in zip(names, slowest.tolist(), strict=True)}


def meet(group: Group) -> None:
    """Wait until every rank of `group` has come here; host memory only, so it works beside NCCL."""
    all_reduce_max(torch.zeros(()), group, "meeting before a timed step")


class _Clock:
    def settle(self) -> None:
        """Nothing runs behind the host's back."""

    def time(self, step: Step) -> float:
        start = time.perf_counter()
        step()
        return 1000 * (time.perf_counter() - start)


class _Events:
    """Never run on a GPU by us."""

    def settle(self) -> None:
        torch.cuda.synchronize()

    def time(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
