"""Means over seeds with Student's t intervals; and what medians over rounds have beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

CONFIDENCE = 0.95
ENOUGH_ROUNDS = 6
"""For an interval of order statistics that holds the median with 95 %."""

Verdict = Literal["better", "worse", "noise", "single"]
"""Of a difference: its interval lies on the good side of zero, on the bad side or around it; one seed has none."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and, from two seeds on, the half width of its 95 % t interval."""

    values: tuple[float, ...]
    """One per seed."""
    mean: float
    half_width: float | None
    """None for a single seed: one draw says nothing about its own spread."""

    @property
    def low(self) -> float | None:
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        return None if self.half_width is None else self.mean + self.half_width

    def verdict(self, *, higher_is_better: bool) -> Verdict:
        """What this estimate, read as a difference from zero, allows one to say."""
        if self.half_width is None:
            return "single"
        if abs(self.mean) <= self.half_width:
            return "noise"
        return "better" if (self.mean > 0) == higher_is_better else "worse"


def t_factor(count: int) -> float:
    """Half width of the interval of a mean over its sample standard deviation: t(0.975, n−1)/√n, for n ≥ 2."""
    return float(special.stdtrit(count - 1, 0.5 + CONFIDENCE / 2)) / math.sqrt(count)


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and t interval of `values`; None if there are none."""
    if not values:
        return None
    mean = float(np.mean(values))
    half = t_factor(len(values)) * float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Estimate(tuple(float(v) for v in values), mean, half)


def interval_name(rounds: int) -> str:
    """What a median's `low` and `high` are after so many rounds: too few have no interval of 95 %."""
    return "95 %" if rounds >= ENOUGH_ROUNDS else "range"
