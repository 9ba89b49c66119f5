"""What the experts did: load over training, drops and entropies, and which classes they serve.

Shapes: n logged points, E experts, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from swinmoe.report.series import Array, Line, RoutingTrace, select
from swinmoe.report.theme import Theme, new_figure, shorten

MAX_COLUMNS = 400
"""Logged points are averaged into at most so many columns of the heat map."""
MAX_CLASSES = 20
"""Rows of a class table; of more classes the most unevenly spread are shown."""
_METRICS = (
    ("drop_fraction", "dropped tokens", True),
    ("token_entropy", "token entropy / ln E", False),
    ("load_entropy", "load entropy / ln E", False),
    ("max_over_mean", "busiest expert / mean", False),
    ("dead_experts", "dead experts", False),
)


@dataclass(frozen=True)
class ClassTable:
    """Which experts one layer gives the tokens of each class."""

    layer: str
    class_names: tuple[str, ...]
    share: Array
    """(K, E) of each class's tokens; rows sum to one (to zero for a class without tokens)."""
    information: float
    """I(class; expert) / H(class): how much of a token's class its expert gives away, 0 to 1."""

    @property
    def rows(self) -> list[int]:
        """Classes to show, in their own order."""
        if len(self.class_names) <= MAX_CLASSES:
            return list(range(len(self.class_names)))
        spread = self.share.max(axis=1) - self.share.min(axis=1)
        return sorted(np.argsort(-spread, kind="stable")[:MAX_CLASSES].tolist())


def load_figure(traces: Sequence[RoutingTrace], theme: Theme) -> Figure:
    """One panel per layer: expert (down) against step (right), coloured by its share of the tokens."""
    columns = min(2, len(traces))
    rows = math.ceil(len(traces) / columns)
    tallest = max(trace.share.shape[1] for trace in traces)
    figure = new_figure(10.8, rows * min(5.0, 1.2 + 0.19 * max(tallest, 6)))
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes, trace in zip(panels, traces, strict=False):
        experts = trace.share.shape[1]
        step, share = _binned(trace.step, trace.share)
        fair = 1 / experts
        most = max(2 * fair, float(share.max()))
        norm = TwoSlopeNorm(vmin=0.0, vcenter=fair, vmax=most)
        edges = (_edges(step), np.arange(experts + 1) - 0.5)
        mesh = axes.pcolormesh(*edges, share.T, norm=norm, cmap=theme.balance, shading="flat", rasterized=True)
        axes.set_title(shorten(trace.layer, 40))
        axes.set_ylabel("expert")
        axes.set_xlabel("optimiser step")
        axes.invert_yaxis()
        axes.grid(False)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        bar = figure.colorbar(mesh, ax=axes, pad=0.01, ticks=[0.0, fair, most])
        bar.ax.set_yticklabels(["0 %", f"{100 * fair:.1f} % fair", f"{100 * most:.1f} %"])
        bar.outline.set_visible(False)
    for axes in panels[len(traces) :]:
        axes.set_visible(False)
    return figure


Seeds = Mapping[int, Sequence[RoutingTrace]]
"""Seed -> a trace per layer."""


def health_metrics(seeds: Seeds) -> list[tuple[str, str, bool]]:
    """The metrics (name, title, whether a fraction) of which the records hold anything."""
    return [m for m in _METRICS if any(_known(getattr(t, m[0])) for traces in seeds.values() for t in traces)]


def health_figure(seeds: Seeds, theme: Theme) -> Figure:
    """Drop fraction, entropies, imbalance and dead experts over training: a colour per layer, a line per seed.

    `health_metrics(seeds)` must not be empty.
    """
    shown = health_metrics(seeds)
    layers = list(dict.fromkeys(trace.layer for traces in seeds.values() for trace in traces))
    colours = dict(zip(layers, theme.depth(np.linspace(0, 1, len(layers))), strict=True))
    columns = min(3, len(shown))
    rows = math.ceil((len(shown) + 1) / columns)
    figure = new_figure(10.8, 2.35 * rows, row_gap=0.12)
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes, (name, title, percent) in zip(panels, shown, strict=False):
        for traces in seeds.values():
            for trace in traces:
                axes.plot(trace.step, getattr(trace, name), color=colours[trace.layer], linewidth=1.1, alpha=0.8)
        axes.set_title(title)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        _bound(axes, name)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    for axes in panels[len(shown) :]:
        axes.axis("off")
    _legend(panels[len(shown)], colours)
    return figure


def class_tables(records: Sequence[Line], arm: str, seed: int) -> list[ClassTable]:
    """The latest class-by-expert counts of each layer of one run."""
    latest: dict[str, Line] = {}
    for line in select(records, "class_expert", arm, seed):
        if line.get("table"):
            latest[str(line["layer"])] = line
    return [_class_table(line) for line in latest.values()]


def class_figure(tables: Sequence[ClassTable], theme: Theme) -> Figure:
    """One panel per layer: class (down) against expert (right), coloured by the share of the class's tokens."""
    columns = min(2, len(tables))
    rows = math.ceil(len(tables) / columns)
    height = max(1.2 + 0.24 * len(table.rows) for table in tables)
    figure = new_figure(10.8, rows * height)
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes, table in zip(panels, tables, strict=False):
        share = table.share[table.rows]
        axes.imshow(share, cmap=theme.amount, vmin=0.0, vmax=max(float(share.max()), 1e-9), aspect="auto")
        axes.set_title(f"{shorten(table.layer, 34)} · class information {100 * table.information:.0f} %")
        axes.set_yticks(range(len(table.rows)), [shorten(table.class_names[i], 18) for i in table.rows])
        axes.set_xlabel("expert")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
        axes.grid(False)
        if share.shape[1] <= 16:
            _write_shares(axes, share, theme)
    for axes in panels[len(tables) :]:
        axes.set_visible(False)
    return figure


def _class_table(line: Line) -> ClassTable:
    counts = np.asarray(line["table"], dtype=np.float64)  # (K, E)
    names = [str(name) for name in line.get("class_names") or []]
    names += [str(i) for i in range(len(names), len(counts))]
    total = counts.sum(axis=1, keepdims=True)
    return ClassTable(
        str(line["layer"]), tuple(names[: len(counts)]), counts / np.maximum(total, 1), _information(counts)
    )


def _information(counts: Array) -> float:
    """Mutual information of class and expert over the classes' entropy, from (K, E) counts."""
    joint = counts / max(counts.sum(), 1.0)
    classes, experts = joint.sum(axis=1), joint.sum(axis=0)
    entropy = -float(sum(p * math.log(p) for p in classes if p > 0))
    known = joint > 0
    mutual = float((joint[known] * np.log(joint[known] / np.outer(classes, experts)[known])).sum())
    return max(0.0, mutual / entropy) if entropy > 0 else 0.0


def _binned(step: Array, share: Array) -> tuple[Array, Array]:
    """(n,), (n, E) averaged over runs of neighbours until n <= MAX_COLUMNS."""
    if len(step) <= MAX_COLUMNS:
        return step, share
    bins = np.array_split(np.arange(len(step)), MAX_COLUMNS)
    return np.asarray([step[b].mean() for b in bins]), np.stack([share[b].mean(axis=0) for b in bins])


def _edges(step: Array) -> Array:
    """(n,) centres -> (n + 1,) borders half-way between them."""
    if len(step) == 1:
        return np.asarray([step[0] - 0.5, step[0] + 0.5])
    middle = (step[1:] + step[:-1]) / 2
    return np.concatenate([[1.5 * step[0] - 0.5 * step[1]], middle, [1.5 * step[-1] - 0.5 * step[-2]]])


def _known(values: Array) -> bool:
    return bool(np.isfinite(values).any())


def _bound(axes: Axes, name: str) -> None:
    """Natural limits, so that a flat line does not look like an event."""
    low, high = axes.get_ylim()
    if name in ("token_entropy", "load_entropy"):
        axes.set_ylim(min(low, 0.8), 1.02)
    elif name == "max_over_mean":
        axes.set_ylim(0.95, max(high, 2.0))
    elif name == "dead_experts":
        axes.set_ylim(-0.1, max(high, 2.0))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    else:
        axes.set_ylim(0.0, max(high, 0.02))


def _legend(axes: Axes, colours: Mapping[str, Any]) -> None:
    for place, (layer, colour) in enumerate(colours.items()):
        y = 0.94 - place * min(0.12, 0.9 / len(colours))
        size = 8.5 if len(colours) <= 8 else 6.5
        axes.plot([0.0, 0.08], [y, y], color=colour, linewidth=3, transform=axes.transAxes)
        axes.text(0.11, y, shorten(layer, 30), transform=axes.transAxes, va="center", fontsize=size)


def _write_shares(axes: Axes, share: Array, theme: Theme) -> None:
    strongest = max(float(share.max()), 1e-9)
    for (row, column), value in np.ndenumerate(share):
        if value >= 0.005:
            colour = theme.surface if value > 0.5 * strongest else theme.ink
            text = axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
            text.set_in_layout(False)  # inside the axes anyway, and there are many
