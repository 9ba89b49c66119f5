"""Pictures of an evaluation: whether confidence is deserved, and what capacity costs. From plain numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swinmoe.records import ConfidenceBin
from swinmoe.report.theme import LIGHT, Theme, new_figure, styled, to_png


@dataclass(frozen=True)
class CapacityPoint:
    """An evaluation at one capacity."""

    label: str
    accuracy: float
    drop_fraction: float


def reliability_figure(bins: Sequence[ConfidenceBin], ece: float, theme: Theme = LIGHT) -> bytes:
    """A PNG: accuracy by confidence against the diagonal, and below it how many images each bin has."""
    with styled(theme):
        figure = new_figure(4.6, 5.2)
        above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
        shown = [b for b in bins if b.count]
        width = [b.high - b.low for b in shown]
        left = [b.low for b in shown]
        above.bar(left, [b.accuracy for b in shown], width, align="edge", color=theme.arm(0), edgecolor=theme.surface)
        above.plot([0, 1], [0, 1], "--", color=theme.muted, linewidth=1, label="confidence = accuracy")
        above.plot([b.confidence for b in shown], [b.accuracy for b in shown], "o", color=theme.arm(1), markersize=3)
        above.set(ylabel="share recognised", ylim=(0, 1), xlim=(0, 1))
        above.set_title(f"Reliability: expected calibration error {100 * ece:.2f} %")
        above.legend(frameon=False, loc="upper left")
        total = sum(b.count for b in shown) or 1
        below.bar(left, [b.count / total for b in shown], width, align="edge", color=theme.muted)
        below.set(xlabel="confidence of the prediction", ylabel="share of images")
        return to_png(figure)


def capacity_figure(points: Sequence[CapacityPoint], theme: Theme = LIGHT) -> bytes:
    """A PNG: accuracy, and the share of choices dropped, at each capacity factor."""
    with styled(theme):
        figure = new_figure(5.6, 4.6)
        above, below = figure.subplots(2, 1, sharex=True)
        places = list(range(len(points)))
        above.plot(places, [100 * p.accuracy for p in points], "o-", color=theme.arm(0))
        above.set(ylabel="accuracy, %")
        above.set_title("Capacity at evaluation")
        below.bar(places, [100 * p.drop_fraction for p in points], 0.6, color=theme.arm(1))
        below.set(ylabel="choices dropped, %", xlabel="capacity factor")
        below.set_xticks(places, [p.label for p in points])
        return to_png(figure)
