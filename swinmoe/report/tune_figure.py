"""A picture of the capacity tuner's curves: drops, time and accuracy over the factor. From records only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from swinmoe.report.theme import LIGHT, Theme, new_figure, styled, to_png

_GAP = 0.5
"""From the largest factor to where dropless stands."""
TITLES = {"train": "training", "eval": "evaluation"}


def capacity_curves(records: Sequence[Mapping[str, Any]], theme: Theme = LIGHT) -> bytes:
    """A PNG: a column per mode with δ(c) by layer, t(c) with the medians' intervals, and a(c); with batch priority
    dashed, the recommended factors as marks on δ."""
    modes = [mode for mode in TITLES if any(r["kind"] == "recommendation" and r["mode"] == mode for r in records)]
    with styled(theme):
        figure = new_figure(4.6 * len(modes), 7.6)
        axes = figure.subplots(3, len(modes), sharex="col", squeeze=False)
        for column, mode in enumerate(modes):
            for axis, what in ((axes[1][column], "ms"), (axes[2][column], "accuracy")):
                end = _over_factor(axis, records, mode, theme, what)
            _drops(axes[0][column], records, mode, theme, end)
            axes[2][column].set(xlabel="capacity factor (∞: dropless)")
        return to_png(figure)


def _drops(axis: Any, records: Sequence[Mapping[str, Any]], mode: str, theme: Theme, end: float) -> None:
    """Of every layer, up to just before where dropless stands."""
    (found,) = (r for r in records if r["kind"] == "recommendation" and r["mode"] == mode)
    curves = [r for r in records if r["kind"] == "drop_curve" and r["mode"] == mode]
    for number, curve in enumerate(curves):
        colour = theme.depth(number / max(1, len(curves) - 1))
        shown = [(c, d) for c, d in zip(curve["factors"], curve["drops"], strict=True) if c < end - _GAP / 2]
        axis.plot([c for c, _ in shown], [100 * d for _, d in shown], color=colour, label=curve["layer"])
        factor = found["factors"][curve["layer"]]
        if factor is not None:
            axis.plot([factor], [100 * found["chosen"]["drops"][curve["layer"]]], "o", color=colour, markersize=5)
    axis.set(ylabel="choices dropped, %", ylim=(0, None))
    axis.set_title(f"Capacity in {TITLES[mode]}")
    if len(curves) <= 8:
        axis.legend(frameon=False, fontsize=7)


def _over_factor(axis: Any, records: Sequence[Mapping[str, Any]], mode: str, theme: Theme, what: str) -> float:
    """Uniform factors only; dropless stands at the right end, which is returned."""
    points = [r for r in records if r["kind"] == "measurement" and r["variant"]["mode"] == mode and _uniform(r)]
    factors = sorted({f for f in map(_factor, points) if f is not None})
    end = (factors[-1] if factors else 1.0) + _GAP
    for number, priority in enumerate((False, True)):
        own = sorted(
            ((_factor(r) or end, r) for r in points if r["variant"]["batch_prioritized"] == priority),
            key=lambda pair: pair[0],
        )
        if not own:
            continue
        style = {"color": theme.arm(number), "marker": "o", "markersize": 3, "linestyle": "--" if priority else "-"}
        name = "by priority" if priority else "in order"
        x = [place for place, _ in own]
        if what == "accuracy":
            axis.plot(x, [100 * r["accuracy"] for _, r in own], label=name, **style)
        else:
            middle = [r["ms"]["median"] for _, r in own]
            below = [r["ms"]["median"] - r["ms"]["low"] for _, r in own]
            above = [r["ms"]["high"] - r["ms"]["median"] for _, r in own]
            axis.errorbar(x, middle, yerr=(below, above), capsize=2, label=name, **style)
    axis.set(ylabel="accuracy, %" if what == "accuracy" else "ms a step")
    axis.set_xticks([*factors, end], [*(f"{f:g}" for f in factors), "∞"], rotation=45)
    axis.set_xlim(0, end + _GAP / 4)
    axis.legend(frameon=False, fontsize=7)
    return end


def _uniform(record: Mapping[str, Any]) -> bool:
    return len(set(record["factors"].values())) == 1 and not record["variant"]["capacity"].startswith("by layer")


def _factor(record: Mapping[str, Any]) -> float | None:
    factor: float | None = next(iter(record["factors"].values()))
    return factor
