"""Loads of experts as they were seen, and what any capacity would drop of them.

Shapes: E experts, T tokens that one process's batch brings to a layer, K choices per token.

δ(c), the share of the choices that find no slot, needs no run of its own: a queue keeps min(load, C), and C follows
from c and the batch's T. Priority decides who is dropped, never how many. What changes loads is what earlier layers
drop; so δ holds for the loads it is taken from.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from swinmoe.config import CapacityPolicy
from swinmoe.moe import capacity

STEP = 0.01
"""Factors are recommended in steps of this size."""
_ONE_SIDED_95 = 1.645


@dataclass(frozen=True)
class Load:
    """One batch at one layer."""

    routed: tuple[int, ...]
    """(E,) choices before drops."""
    tokens: int
    """T."""
    top_k: int

    @property
    def choices(self) -> int:
        """T·K."""
        return sum(self.routed)

    def dropped(self, policy: CapacityPolicy) -> int:
        """Choices that find no slot."""
        slots = capacity(policy, self.tokens, len(self.routed), self.top_k)
        return 0 if slots is None else sum(max(0, load - slots) for load in self.routed)


Loads = Mapping[str, Sequence[Load]]
"""By layer, batch after batch."""


def drop_fraction(loads: Sequence[Load], policy: CapacityPolicy) -> float:
    """δ over all batches; 0 without choices."""
    choices = sum(load.choices for load in loads)
    return sum(load.dropped(policy) for load in loads) / choices if choices else 0.0


def imbalance(loads: Sequence[Load], ranks: int | None = None, together: int = 1) -> float:
    """Choices of the busiest over the mean, drops counted: 1 = balanced, 0 without choices; the mean over batches.

    Args:
        loads: batch after batch.
        ranks: that share the experts. Of n ranks, rank r holds the experts [r·E/n, (r + 1)·E/n), or one of the slices
            of an expert where n > E, which sees all of its rows. None = of single experts.
        together: neighbouring batches that meet at the experts, of as many processes, taken as one.
    """
    found = []
    for first in range(0, len(loads), together):
        experts = [sum(part) for part in zip(*(load.routed for load in loads[first : first + together]), strict=True)]
        each = max(1, len(experts) // (ranks or len(experts)))
        busy = [sum(experts[i : i + each]) for i in range(0, len(experts), each)]
        if sum(busy):
            found.append(max(busy) * len(busy) / sum(busy))
    return statistics.fmean(found) if found else 0.0


def upper_bound(values: Sequence[float]) -> float:
    """One-sided 95 % bound of the mean that `values` are drawn from; of fewer than two, the mean itself."""
    mean = statistics.fmean(values) if values else 0.0
    if len(values) < 2:
        return mean
    return mean + _ONE_SIDED_95 * statistics.stdev(values) / math.sqrt(len(values))


def drop_bound(loads: Sequence[Load], policy: CapacityPolicy) -> float:
    """What δ is unlikely to exceed over other batches like these: the bound of its mean over batches."""
    return upper_bound([load.dropped(policy) / load.choices for load in loads if load.choices])


def least_factor(loads: Sequence[Load], policy: CapacityPolicy, max_drop: float) -> float:
    """The smallest multiple of `STEP` from which on `drop_bound` stays within `max_drop`.

    `policy` gives kind and least slots; it is no dropless one. E is always enough: C = K·⌈T/E⌉·E ≥ T.
    """
    assert loads and policy.kind != "dropless"

    def fits(step: int) -> bool:
        return drop_bound(loads, replace(policy, factor=step * STEP)) <= max_drop

    # δ of every batch falls with the factor, so that their mean does; the bound may waver near the end of the search.
    low, high = 0, round(len(loads[0].routed) / STEP)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return round(high * STEP, 10)
