"""Learning curves: every arm against steps, training FLOPs and step time.

Shapes: n logged points, s seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from swinmoe.report.interval import t_factor
from swinmoe.report.series import Array, Curve, Curves
from swinmoe.report.summarise import Summary
from swinmoe.report.theme import Theme, new_figure, shorten
from swinmoe.report.wording import duration_of, prefix_of

SMOOTH_FROM = 40
"""Curves with at least so many points are averaged over a twentieth of their length, and set their frame without the
first eighth, in which the loss falls from a height that would flatten everything after it."""
BAND_FROM = 3
"""Seeds from which the interval is drawn: over two, t(0.975, 1)/√2 = 9 standard deviations would fill every panel."""
AXES = ("step", "flops", "seconds")


def curve_figure(curves: Curves, label: str, theme: Theme, *, summary: Summary, percent: bool = False) -> Figure:
    """Three panels with one vertical axis: thin lines are seeds, the strong line is their mean, the band its interval.

    Args:
        curves: arm -> seed -> curve, at least one.
        label: what the vertical axis shows.
        summary: fixes the arms' colours, and which seeds enter the mean.
        percent: values are fractions, shown as percentages.
    """
    figure = new_figure(10.8, 3.4)
    panels = figure.subplots(1, 3, sharey=True)
    scale = 100.0 if percent else 1.0
    colours = {arm.name: theme.arm(i) for i, arm in enumerate(summary.arms)}
    averaged = {arm: _averaged(seeds, summary.arm(arm).seeds) for arm, seeds in curves.items()}
    for axes, name in zip(panels, AXES, strict=True):
        factor, title = _horizontal(name, curves)
        for arm, seeds in curves.items():
            _draw(axes, name, seeds, averaged[arm], colours[arm], factor, scale)
        axes.set_title(title)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    panels[0].set_ylim(*_frame(curves, scale))
    panels[0].set_ylabel(f"{label}, %" if percent else label)
    ends = {arm: float(mean_curve(seeds, "step")[1][-1]) * scale for arm, seeds in averaged.items()}
    _name_lines(panels[-1], ends, colours)
    return figure


def smoothed(value: Array) -> Array:
    """(n,) -> (n,) centred moving average, its window shrinking towards the ends; short curves as they are."""
    if len(value) < SMOOTH_FROM:
        return value
    half = max(1, len(value) // 40)
    total = np.concatenate([[0.0], np.cumsum(value)])
    middle = np.arange(len(value))
    reach = np.minimum(half, np.minimum(middle, len(value) - 1 - middle))
    return np.asarray((total[middle + reach + 1] - total[middle - reach]) / (2 * reach + 1))


def mean_curve(seeds: Mapping[int, Curve], axis: str) -> tuple[Array, Array, Array | None]:
    """Mean position and value over the steps that all seeds share, and the half width of the interval; (n,) each."""
    common = _common(seeds)
    picked = [(curve, np.searchsorted(curve.step, common)) for curve in seeds.values()]
    x = np.mean([curve.axis(axis)[i] for curve, i in picked], axis=0)
    values = np.stack([smoothed(curve.value)[i] for curve, i in picked])  # (s, n)
    half = t_factor(len(values)) * values.std(axis=0, ddof=1) if len(values) > 1 else None
    return x, values.mean(axis=0), half


def _common(seeds: Mapping[int, Curve]) -> Array:
    return reduce(np.intersect1d, [curve.step for curve in seeds.values()])


def _averaged(seeds: Mapping[int, Curve], counted: Sequence[int]) -> dict[int, Curve]:
    """The seeds that enter the mean: the counted ones if they share steps, else the longest alone."""
    chosen = {seed: curve for seed, curve in seeds.items() if seed in counted} or dict(seeds)
    if len(_common(chosen)):
        return chosen
    longest = max(chosen, key=lambda seed: float(chosen[seed].step[-1]))
    return {longest: chosen[longest]}


def _draw(
    axes: Axes,
    name: str,
    seeds: Mapping[int, Curve],
    mean_of: Mapping[int, Curve],
    colour: str,
    factor: float,
    scale: float,
) -> None:
    if len(seeds) > 1 or any(len(curve.value) >= SMOOTH_FROM for curve in seeds.values()):
        for curve in seeds.values():
            axes.plot(curve.axis(name) / factor, curve.value * scale, color=colour, linewidth=0.7, alpha=0.4)
    x, mean, half = mean_curve(mean_of, name)
    marker = "o" if len(mean) < 15 else ""
    axes.plot(x / factor, mean * scale, color=colour, linewidth=2.2, marker=marker, markersize=3.5)
    if half is not None and len(mean_of) >= BAND_FROM:
        axes.fill_between(
            x / factor, (mean - half) * scale, (mean + half) * scale, color=colour, alpha=0.14, linewidth=0
        )


def _frame(curves: Curves, scale: float) -> tuple[float, float]:
    """Vertical limits from the seeds' own lines: an interval over few seeds can dwarf them."""
    runs = [curve for seeds in curves.values() for curve in seeds.values()]
    longest = max(runs, key=lambda curve: len(curve.value))
    start = longest.step[-1] / 8 if len(longest.value) >= SMOOTH_FROM else 0.0
    settled = np.concatenate([curve.value[curve.step >= start] for curve in runs]) * scale
    low, high = float(settled.min()), float(settled.max())
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin


def _horizontal(name: str, curves: Curves) -> tuple[float, str]:
    """Factor and title of a panel."""
    if name == "step":
        return 1.0, "against optimiser steps"
    ends = [curve.axis(name)[-1] for seeds in curves.values() for curve in seeds.values()]
    largest = float(np.nanmax([0.0, *ends]))
    if name == "flops":
        factor, prefix = prefix_of(largest)
        return factor, f"against training compute, {prefix}FLOPs"
    factor, unit = duration_of(largest)
    return factor, f"against step time, {unit}"


def _name_lines(axes: Axes, ends: Mapping[str, float], colours: Mapping[str, str]) -> None:
    """Each arm's name at the right edge beside the end of its mean, pushed apart where names would overlap."""
    low, high = axes.get_ylim()
    gap = 0.08 * (high - low)
    ordered = sorted(ends.items(), key=lambda item: item[1])
    places: list[float] = []
    for _, value in ordered:
        places.append(max(value, places[-1] + gap) if places else max(value, low))
    surplus = max(0.0, places[-1] - high)
    for place, (arm, _) in zip(places, ordered, strict=True):
        axes.annotate(
            shorten(arm, 20),
            xy=(1.0, place - surplus),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            color=colours[arm],
            va="center",
            fontweight="bold",
        )
