"""Curves out of record lines: what changed over training, per arm and seed.

Shapes: n logged points, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Line = dict[str, Any]
Array = NDArray[np.float64]
Curves = dict[str, dict[int, "Curve"]]
"""Arm -> seed -> curve."""


@dataclass(frozen=True)
class Curve:
    """One quantity of one run; all arrays (n,), in order of steps."""

    step: Array
    flops: Array
    """Cumulative training FLOPs."""
    seconds: Array
    """Cumulative step time."""
    value: Array

    def axis(self, name: str) -> Array:
        """`step`, `flops` or `seconds`."""
        return {"step": self.step, "flops": self.flops, "seconds": self.seconds}[name]


@dataclass(frozen=True)
class RoutingTrace:
    """One expert layer of one run over training. NaN where a line lacks a number."""

    layer: str
    step: Array
    """(n,)"""
    share: Array
    """(n, E) share of the kept tokens (of the routed ones where kept is not recorded) at each expert."""
    drop_fraction: Array
    token_entropy: Array
    load_entropy: Array
    max_over_mean: Array
    dead_experts: Array


def arm_names(records: Sequence[Line]) -> list[str]:
    """Arms in order of appearance."""
    return list(dict.fromkeys(str(line["arm"]) for line in records if line.get("arm") is not None))


def seeds_of(records: Sequence[Line], arm: str) -> list[int]:
    """Seeds of one arm, ascending."""
    return sorted({int(line["seed"]) for line in records if line.get("arm") == arm and line.get("seed") is not None})


def select(records: Sequence[Line], kind: str, arm: str, seed: int) -> list[Line]:
    """Lines of one kind of one run, in order of steps."""
    found = [x for x in records if x["kind"] == kind and x.get("arm") == arm and x.get("seed") == seed]
    return sorted(found, key=lambda line: line.get("step") or 0)


def last(records: Sequence[Line], kind: str, arm: str, seed: int) -> Line:
    """The latest line of a kind of one run, or an empty mapping."""
    found = select(records, kind, arm, seed)
    return found[-1] if found else {}


def evaluated_weights(records: Sequence[Line]) -> str:
    """`ema` where averaged weights were evaluated (then they are the result), else `model`."""
    return "ema" if any(x["kind"] == "eval" and x.get("weights") == "ema" for x in records) else "model"


def evaluated_split(records: Sequence[Line]) -> str:
    """The held-out split as the records name it; `test` where they do not."""
    found = (x["split"] for x in reversed(records) if x["kind"] == "eval" and x.get("split") not in (None, "train"))
    return str(next(found, "test"))


def evaluations(records: Sequence[Line], arm: str, seed: int) -> list[Line]:
    """Evaluations of the weights that count, on held-out data."""
    weights = evaluated_weights(records)
    split = evaluated_split(records)
    lines = select(records, "eval", arm, seed)
    return [x for x in lines if x.get("weights", weights) == weights and x.get("split", split) == split]


def training_curves(records: Sequence[Line], key: str) -> Curves:
    """`key` of the step lines, per arm and seed; runs without any such number are left out."""
    return _curves(records, key, lambda arm, seed: select(records, "step", arm, seed))


def evaluation_curves(records: Sequence[Line], key: str) -> Curves:
    """`key` of the held-out evaluations, per arm and seed."""
    return _curves(records, key, lambda arm, seed: evaluations(records, arm, seed))


def _curves(records: Sequence[Line], key: str, lines_of: Callable[[str, int], list[Line]]) -> Curves:
    out: Curves = {}
    for arm in arm_names(records):
        for seed in seeds_of(records, arm):
            lines = [x for x in lines_of(arm, seed) if x.get(key) is not None and x.get("step") is not None]
            if lines:
                step, flops, seconds, value = (_column(lines, name) for name in ("step", "flops", "seconds", key))
                out.setdefault(arm, {})[seed] = Curve(step, flops, seconds, value)
    return out


def late_loss(lines: Sequence[Line]) -> float | None:
    """Mean loss over the last tenth of the steps, from the step lines of one run; as `final` lines measure it.

    Every line speaks for the steps since the one before it.
    """
    points = [(int(x["step"]), float(x["loss"])) for x in lines if x.get("loss") is not None and x.get("step")]
    if not points:
        return None
    late = [(b[0] - a[0], b[1]) for a, b in pairwise([(0, 0.0), *points]) if b[0] > 0.9 * points[-1][0]]
    return sum(steps * loss for steps, loss in late) / sum(steps for steps, _ in late)


def images_per_second(lines: Sequence[Line]) -> float | None:
    """Median over logged intervals of images per second of step time; `lines` are the step lines of one run.

    The first line has no predecessor and is left out (it holds the warm-up), unless it is the only one.
    """
    points = [
        (x["images"], x["seconds"]) for x in lines if x.get("images") is not None and x.get("seconds") is not None
    ]
    if len(points) == 1:
        points = [(0, 0.0), *points]
    pairs = pairwise(points)
    rates = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in pairs if b[1] > a[1] and b[0] > a[0]]
    return float(np.median(rates)) if rates else None


def routing_traces(records: Sequence[Line], arm: str, seed: int) -> list[RoutingTrace]:
    """One trace per expert layer of a run, in the model's order; empty for a dense arm."""
    lines = [x for x in select(records, "step", arm, seed) if x.get("routing")]
    declared = last(records, "arm", arm, seed).get("moe_layers") or []
    seen = dict.fromkeys(layer for line in lines for layer in line["routing"])
    order = [*(name for name in declared if name in seen), *(name for name in seen if name not in declared)]
    return [trace for layer in order if (trace := _trace(layer, lines)) is not None]


def _trace(layer: str, lines: Sequence[Line]) -> RoutingTrace | None:
    points = [(line["step"], line["routing"][layer]) for line in lines if line["routing"].get(layer)]
    loads = [stats.get("kept") or stats.get("routed") for _, stats in points]
    points = [p for p, load in zip(points, loads, strict=True) if load]
    loads = [load for load in loads if load]
    if not points:
        return None
    load = np.asarray(loads, dtype=np.float64)
    total = load.sum(axis=1, keepdims=True)
    stats = [s for _, s in points]
    return RoutingTrace(
        layer=layer,
        step=np.asarray([s for s, _ in points], dtype=np.float64),
        share=load / np.maximum(total, 1),
        drop_fraction=_column(stats, "drop_fraction"),
        token_entropy=_column(stats, "token_entropy"),
        load_entropy=_column(stats, "load_entropy"),
        max_over_mean=_column(stats, "max_over_mean"),
        dead_experts=_column(stats, "dead_experts"),
    )


def _column(lines: Iterable[Line], key: str) -> Array:
    """(n,) numbers, NaN where missing; a list (of dead experts) counts as its length."""
    values = [line.get(key) for line in lines]
    return np.asarray([np.nan if v is None else len(v) if isinstance(v, list) else v for v in values], dtype=np.float64)
