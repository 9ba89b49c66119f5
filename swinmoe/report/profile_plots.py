"""Pictures of a profile: phases, throughput over capacity, bandwidth over size, ranks, communication, memory.

Narrow on purpose: a page sets two side by side, and a telephone one below the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from swinmoe.report.profile_data import Line, Measured, grouped
from swinmoe.report.theme import Theme, new_figure, shorten
from swinmoe.report.wording import percent

WIDTH = 5.4
"""Inches of a figure."""
BARS = 12
"""Bars of one figure; of more there are several figures."""
SERIES = 10
"""Lines of one figure."""
PHASES = {
    "attention": "attention",
    "mlp": "dense MLPs",
    "route": "route",
    "scatter": "scatter",
    "exchange_out": "exchange out",
    "experts": "experts",
    "exchange_back": "exchange back",
    "gather": "gather",
    "optimizer": "optimiser",
    "other": "other",
}
CLASSES = {
    "dense": "dense parameters",
    "experts": "experts",
    "optimizer": "optimiser state",
    "dispatch": "dispatch buffers",
    "activations": "activations",
}
_HUES = {
    "light": {
        "experts": "#0072b2",
        "dense": "#3f97cc",
        "mlp": "#3f97cc",
        "attention": "#8a6fd1",
        "route": "#b8548f",
        "scatter": "#009e73",
        "gather": "#6cc7a8",
        "dispatch": "#009e73",
        "exchange_out": "#d55e00",
        "exchange_back": "#f0a868",
        "exposed": "#d55e00",
        "hidden": "#f0c9a0",
        "optimizer": "#a67c00",
        "activations": "#b8548f",
        "other": "#aab4c0",
    },
    "dark": {
        "experts": "#58b0ee",
        "dense": "#a9d8f7",
        "mlp": "#a9d8f7",
        "attention": "#b39dff",
        "route": "#e58cc3",
        "scatter": "#2ed3a1",
        "gather": "#1c8466",
        "dispatch": "#2ed3a1",
        "exchange_out": "#ff8b3d",
        "exchange_back": "#b35b1e",
        "exposed": "#ff8b3d",
        "hidden": "#6b4426",
        "optimizer": "#e6c04a",
        "activations": "#e58cc3",
        "other": "#5f6b7b",
    },
}
_LINES = ("-", "--", ":", "-.")
Bar = tuple[str, Mapping[str, float]]
"""A label and the parts of a bar."""


def stacked_figure(
    bars: Sequence[Bar],
    names: Mapping[str, str],
    theme: Theme,
    *,
    unit: str,
    title: str = "",
    widest: float = 0.0,
    marks: Sequence[float | None] = (),
) -> Figure:
    """Horizontal stacked bars, each under its own label, so that long labels take no room from the bars.

    Args:
        bars: at least one.
        names: parts in order, and how a legend calls them; those that no bar has are left out.
        theme: colours, by part.
        unit: of the axis.
        title: above the bars.
        widest: the longest bar of this figure and others that are to have its scale.
        marks: a value on each bar to be marked.
    """
    shown = {part: name for part, name in names.items() if any(own.get(part) for _, own in bars)}
    figure = new_figure(WIDTH, 0.75 + 0.25 * bool(title) + 0.2 * math.ceil(len(shown) / 4) + 0.43 * len(bars))
    axes = figure.subplots()
    left = np.zeros(len(bars))
    place = np.arange(len(bars))
    for part, name in shown.items():
        values = np.array([own.get(part, 0.0) for _, own in bars])
        axes.barh(place, values, 0.42, left=left, color=_HUES[theme.name][part], label=name)
        left += values
    for number, value in enumerate(marks):
        if value is not None:
            axes.plot([value, value], [number - 0.28, number + 0.28], color=theme.ink, linewidth=1.6)
    widest = max(widest, float(left.max()), *(value for value in marks if value is not None), 0.0)
    axes.set_xlim(0, widest * 1.12 or 1)
    for number, (label, _) in enumerate(bars):
        axes.text(0, number - 0.31, shorten(label, 68), color=theme.ink, fontsize=8.5, va="bottom")
        axes.text(left[number], number, f" {short(left[number])}", color=theme.muted, fontsize=8, va="center")
    axes.set_ylim(len(bars) - 0.6, -0.75)
    axes.set_yticks([])
    axes.set_xlabel(unit)
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.spines["left"].set_visible(False)
    if shown:
        figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=8, handlelength=1, columnspacing=1.2)
    return figure


def phases_figure(measured: Sequence[Measured], direction: str, widest: float, theme: Theme) -> Figure:
    """Milliseconds of a pass by phase."""
    bars = [(m.label, m.phases.get(direction, {})) for m in measured]
    return stacked_figure(bars, PHASES, theme, unit="ms", title=direction.capitalize(), widest=widest)


def communication_figure(measured: Sequence[Measured], widest: float, theme: Theme) -> Figure:
    """Exposed and hidden milliseconds; a mark where the exchange alone ends."""
    bars = [
        (
            m.label if m.exposed_share is None else f"{shorten(m.label, 50)}: {percent(m.exposed_share)} of the step",
            {"exposed": m.exposed or 0.0} | ({"hidden": m.hidden} if m.hidden else {}),
        )
        for m in measured
    ]
    names = {"exposed": "exposed: the step waits", "hidden": "hidden behind other work"}
    marks = [m.alone for m in measured]
    unit = "ms; the mark is the exchange alone" if any(marks) else "ms"
    return stacked_figure(bars, names, theme, unit=unit, widest=widest, marks=marks)


def memory_figure(measured: Sequence[Measured], widest: float, theme: Theme) -> Figure:
    """Mebibytes by class at the peak."""
    bars = [(m.label, {k: v / 2**20 for k, v in m.memory.items() if k in CLASSES and v}) for m in measured]
    return stacked_figure(bars, CLASSES, theme, unit="MiB at the peak of a step", widest=widest / 2**20)


def capacity_series(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Measurements that differ in capacity alone, where there are several."""
    own = [m for m in measured if m.rate is not None and m.capacity is not None]
    return {k: group for k, group in grouped(own, ("capacity",)).items() if len({m.capacity for m in group}) > 1}


def capacity_figure(series: Mapping[str, Sequence[Measured]], theme: Theme) -> Figure:
    """Throughput over the capacity factor with the dense baseline's, and below it the share of choices dropped."""
    series = dict(list(series.items())[:SERIES])
    measured = [m for own in series.values() for m in own]
    factors = sorted({m.capacity for m in measured if m.capacity is not None and math.isfinite(m.capacity)})
    end = (factors[-1] if factors else 1.0) + 0.4
    figure = new_figure(WIDTH, 4.6 + 0.19 * len(series))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for number, (label, own) in enumerate(series.items()):
        style = _style(theme, number) | {"marker": "o", "markersize": 3.5}
        points = _by_capacity(own, end)
        rate = [m.rate or 0.0 for _, m in points]
        x = [place for place, _ in points]
        above.errorbar(x, rate, yerr=_spread(rate, [m for _, m in points]), label=label, capsize=2, **style)
        drops = [(place, 100 * m.drop_loss) for place, m in points if m.drop_loss is not None]
        below.plot([p for p, _ in drops], [d for _, d in drops], **style)
    for label, rates in _baseline_rates(measured).items():
        level = float(np.median(rates))
        above.axhline(level, color=theme.muted, linewidth=1.2, linestyle=(0, (4, 3)))
        above.annotate(
            shorten(label, 40),
            (0, level),
            xycoords=("axes fraction", "data"),
            xytext=(3, 2),
            textcoords="offset points",
            color=theme.muted,
            fontsize=8,
        )
    above.set_ylim(0, None)
    above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    above.set_ylabel(measured[0].rate_unit)
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower left", frameon=False, fontsize=8)
    below.set_ylim(0, None)
    below.set_ylabel("choices dropped, %")
    below.set_xlabel("capacity factor (∞: dropless)")
    last = [end] if any(m.capacity == math.inf for m in measured) else []
    below.set_xticks([*factors, *last], [*(f"{f:g}" for f in factors), *("∞" for _ in last)])
    return figure


def _spread(values: Sequence[float], measured: Sequence[Measured]) -> list[list[float]]:
    """How far rates of these times reach below and above by the medians' intervals."""
    pairs = list(zip(values, measured, strict=True))
    return [[v * (1 - m.ms / m.high) for v, m in pairs], [v * (m.ms / m.low - 1) for v, m in pairs]]


def _baseline_rates(measured: Sequence[Measured]) -> dict[str, list[float]]:
    """Of each kind of baseline, which may have been measured several times beside different steps."""
    found: dict[str, list[float]] = {}
    for base in dict.fromkeys(m.baseline for m in measured if m.baseline is not None):
        if base.rate is not None:
            name = base.line["name"].partition(" #")[0]
            found.setdefault(f"{name}, {base.world} ranks" if base.world > 1 else name, []).append(base.rate)
    return dict(list(found.items())[:3])


def _by_capacity(own: Sequence[Measured], end: float) -> list[tuple[float, Measured]]:
    placed = [(end if m.capacity == math.inf else float(m.capacity or 0.0), m) for m in own]
    return sorted(placed, key=lambda pair: pair[0])


def bandwidth_figure(measured: Sequence[Measured], fits: Sequence[Line], theme: Theme) -> Figure:
    """Bus bandwidth over message size: what was measured with its interval, and the fit as a line.

    Args:
        measured: even exchanges of one direction.
        fits: of these, one group size each.
        theme: colours.
    """
    series = list(grouped(measured, ("bytes", "direction", "world")).items())[:SERIES]
    figure = new_figure(WIDTH, 3.7 + 0.19 * len(series))
    axes = figure.subplots()
    for number, (label, own) in enumerate(series):
        own = sorted(own, key=lambda m: float(m.line["message_bytes"]))
        style = _style(theme, number)
        x = [float(m.line["message_bytes"]) for m in own]
        y = [float(m.line["busbw"]) / 1e9 for m in own]
        bars = axes.errorbar(x, y, yerr=_spread(y, own), fmt="o", capsize=2, markersize=4, color=style["color"])
        bars.set_label(label if label != "all" else own[0].variant.get("exchange", ""))
        if (fit := fit_of(own[0], fits)) is not None:
            sizes = np.geomspace(min(x), max(x), 100)
            ranks = int(own[0].line["ranks"])
            rate = sizes * (ranks - 1) / predicted_seconds(fit, sizes) / 1e9
            axes.plot(sizes, rate, linewidth=1.4, **style)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, None)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_said(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelrotation=30)
    axes.set_xlabel("message from each rank to each")
    axes.set_ylabel("bus bandwidth, GB/s")
    axes.set_title(f"{str(measured[0].variant.get('direction')).capitalize()}: measured, and fitted as a line")
    figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    return figure


def fit_of(measured: Measured, fits: Sequence[Line]) -> Line | None:
    """The fit of a measurement's kind and group size."""
    keys = ("exchange", "local_size", "chunks", "payload", "direction", "ep_size")
    for fit in fits:
        own = fit["variant"]
        if fit["source"] == measured.source and all(own.get(k) == measured.variant.get(k) for k in keys):
            return fit
    return None


def predicted_seconds(fit: Line, sizes: Any) -> Any:
    """The fit's time at message sizes within its own: of one kind and group size it is a straight line."""
    points = sorted((float(p["message_bytes"]), float(p["predicted"])) for p in fit["points"])
    return np.interp(sizes, [p[0] for p in points], [p[1] for p in points])


def skew_figure(measured: Sequence[Measured], theme: Theme) -> Figure:
    """Time over that of the even exchange, over the share of rows that all go to one rank."""
    series = [(k, own) for k, own in grouped(measured, ("skew", "world")).items() if len(own) > 1]
    # latency hides what skew costs small messages: the largest, where there are too many
    series = sorted(series, key=lambda pair: -int(pair[1][0].variant["bytes"]))[:SERIES]
    figure = new_figure(WIDTH, 3.7 + 0.1 * len(series))
    axes = figure.subplots()
    for number, (label, own) in enumerate(series):
        own = sorted(own, key=lambda m: float(m.variant["skew"]))
        axes.plot(
            [float(m.variant["skew"]) for m in own],
            [m.ms / own[0].ms for m in own],
            marker="o",
            markersize=4,
            label=_with_size(label, own[0]),
            **_style(theme, number),
        )
    axes.set_ylim(0, None)
    axes.axhline(1, color=theme.muted, linewidth=1)
    axes.set_xlabel("share of rows that go to one rank")
    axes.set_ylabel("time over the least skewed")
    axes.set_title("Forward, by skew")
    figure.legend(loc="outside lower left", frameon=False, fontsize=8, ncols=2)
    return figure


def _with_size(label: str, measured: Measured) -> str:
    size = measured.variant["bytes"]
    return label.replace(f"bytes {size}", bytes_said(size))


def scaling_figure(series: Mapping[str, Sequence[Measured]], theme: Theme) -> Figure:
    """Throughput over the number of processes, and what it would be if each added as much as the first."""
    figure = new_figure(WIDTH, 3.7 + 0.19 * min(SERIES, len(series)))
    axes = figure.subplots()
    worlds = sorted({m.world for own in series.values() for m in own})
    for number, (label, own) in enumerate(list(series.items())[:SERIES]):
        style = _style(theme, number)
        x = [m.world for m in own]
        first = (own[0].rate or 0.0) / own[0].world
        axes.plot(x, [m.rate or 0.0 for m in own], marker="o", markersize=4, label=shorten(label, 70), **style)
        axes.plot(x, [first * w for w in x], color=style["color"], linewidth=0.8, alpha=0.5, linestyle=(0, (1, 2)))
    axes.set_xticks(worlds, [str(w) for w in worlds])
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel("processes; dotted: each adds as much as the first")
    axes.set_ylabel(next(iter(series.values()))[0].rate_unit)
    figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    return figure


def scaling_series(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Measurements that differ in the number of processes alone, where there are at least two of them.

    Experts on every rank of a job (`ep_size` = processes) are one kind of spreading, whatever their number; one process
    begins every kind.
    """
    found: dict[str, list[Measured]] = {}
    kinds = dict.fromkeys("all ranks" if _all_ranks(m) else str(m.variant.get("ep_size") or 1) for m in measured)
    for kind in kinds:
        own = [m for m in measured if m.world == 1 or kind == _kind(m)]
        for label, group in grouped(own, ("world", "ep_size", "local_size")).items():
            by_world = {m.world: m for m in group}
            if len(by_world) == len(group) > 1 and any(m.world > 1 for m in group):
                said = "experts on all ranks" if kind == "all ranks" else f"ep {kind}"
                name = said if label == "all" else f"{label}, {said}"
                found[name if len(kinds) > 1 else label] = [by_world[w] for w in sorted(by_world)]
    return found


def _all_ranks(m: Measured) -> bool:
    return m.world > 1 and m.variant.get("ep_size") == m.world


def _kind(m: Measured) -> str:
    return "all ranks" if _all_ranks(m) else str(m.variant.get("ep_size") or 1)


def _style(theme: Theme, number: int) -> dict[str, Any]:
    return {"color": theme.arm(number), "linestyle": _LINES[number // len(theme.arms) % len(_LINES)]}


def bytes_said(size: float) -> str:
    """`64 KiB`."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"


def short(value: float) -> str:
    """Three digits; thousands as k."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g}"
