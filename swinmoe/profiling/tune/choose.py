"""Which capacity to recommend: pure decisions about points that were measured.

A user asks for one of two things: that no layer drops more than a share x of its choices, as cheaply as that goes; or
the fastest setting whose accuracy is within y points of dropless. Either must hold beyond the batches it was found on:
bounds are one-sided at 95 %, over batches for drops and over images, paired, for accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swinmoe.profiling.clock import Timing
from swinmoe.profiling.tune.loads import upper_bound
from swinmoe.profiling.tune.passes import Seen, Setting


@dataclass(frozen=True)
class Asked:
    """The user's constraint; one of the two is set."""

    max_drop: float | None = None
    """Of each layer's choices."""
    within: float | None = None
    """Accuracy, in points (1 = one image in a hundred) below dropless."""

    def __post_init__(self) -> None:
        assert (self.max_drop is None) != (self.within is None)

    def __str__(self) -> str:
        if self.max_drop is not None:
            return f"every layer drops at most {100 * self.max_drop:g} % of its choices"
        return f"accuracy within {self.within:g} points of dropless"


@dataclass(frozen=True)
class Point:
    """One setting, as measured."""

    name: str
    setting: Setting
    seen: Seen
    timing: Timing


def points_lost(seen: Seen, reference: Seen) -> float:
    """Accuracy below the reference's, in points."""
    return 100 * (sum(reference.correct) - sum(seen.correct)) / len(seen.correct)


def points_lost_bound(seen: Seen, reference: Seen) -> float:
    """What that is unlikely to exceed on other images: both saw the same ones, and most cancel out."""
    pairs = zip(reference.correct, seen.correct, strict=True)
    return 100 * upper_bound([float(before) - float(now) for before, now in pairs])


def fastest_within(points: Sequence[Point], reference: Seen, within: float) -> Point | None:
    """The fastest point that loses no more than `within` points, by the bound; None if none does.

    Points whose median time lies within the fastest one's interval are as fast: of these, the most accurate, then the
    one that drops least.
    """
    fitting = [point for point in points if points_lost_bound(point.seen, reference) <= within]
    if not fitting:
        return None
    fastest = min(fitting, key=lambda point: point.timing.median)
    as_fast = [point for point in fitting if point.timing.median <= fastest.timing.high]
    return max(as_fast, key=lambda point: (point.seen.accuracy, -point.seen.drop_fraction))


def broken(asked: Asked, seen: Seen, reference: Seen) -> list[str]:
    """Where a pass does not keep what was asked, in words; empty if it does."""
    if asked.max_drop is not None:
        return [
            f"{layer} drops {100 * drop:.2f} % of its choices, {100 * asked.max_drop:g} % are allowed"
            for layer, drop in seen.drops.items()
            if drop > asked.max_drop
        ]
    assert asked.within is not None
    lost = points_lost(seen, reference)
    if lost <= asked.within:
        return []
    return [
        f"accuracy {100 * seen.accuracy:.2f} % is {lost:.2f} points below dropless' {100 * reference.accuracy:.2f} %, "
        f"{asked.within:g} are allowed"
    ]
