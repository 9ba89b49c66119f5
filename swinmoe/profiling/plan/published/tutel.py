"""The plan against the Tutel paper's tables 2 and 7: constants from their first rows, every other row predicted.

Six constants, each from one figure of a first row:

    table 2   bandwidth between nodes         the all-to-all's time
              the expert layer's computing    total less all-to-all
    table 7   computing of the dense model    its training rate, and its rate of inference
              routing and rows of experts     the sparse model's rates, what is left of them

Everything else is the `a100` description's. Fused attention is off: the paper's code had none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import yaml
from scipy.optimize import brentq

from swinmoe.config import CapacityConfig, CapacityPolicy, MoEConfig, ParallelConfig, RunConfig
from swinmoe.config.io import build, with_overrides
from swinmoe.profiling.plan.exchange import all_to_all, layout
from swinmoe.profiling.plan.hardware import Figure, Hardware, load_hardware
from swinmoe.profiling.plan.predict import Scene, dense_work, predict, spreads_of
from swinmoe.profiling.plan.spread import Spread
from swinmoe.profiling.plan.work import ExpertLayer, Setting

JOURNEYS = 4
"""All-to-alls of an expert layer's training step: out and back, forward and backward."""


@dataclass(frozen=True)
class Row:
    """One published figure beside the plan's."""

    table: str
    ranks: int
    what: str
    published: float
    predicted: float
    fitted: bool
    """Of a first row: a constant was chosen so that it comes out."""

    @property
    def error(self) -> float:
        """Predicted over published, less 1."""
        return self.predicted / self.published - 1


def published() -> dict[str, Any]:
    """The tables, as in `tutel.yaml`."""
    text = resources.files("swinmoe.profiling.plan.published").joinpath("tutel.yaml").read_text(encoding="utf-8")
    tables: dict[str, Any] = yaml.safe_load(text)
    return tables


def compare() -> tuple[list[Row], dict[str, float]]:
    """Every figure of both tables beside the plan's, and the constants."""
    tables = published()
    rows, bandwidth, layer_factor = _table2(tables["table2"])
    machine = with_bandwidth(load_hardware("a100"), bandwidth)
    more, factors = _table7(tables["table7"], replace(machine, fused_attention=False))
    return [*rows, *more], {
        "bandwidth between nodes, GB/s": bandwidth / 1e9,
        "expert layer of table 2, times the description's": layer_factor,
        **factors,
    }


def with_bandwidth(hardware: Hardware, bandwidth: float) -> Hardware:
    """`hardware` with another bandwidth between nodes, bytes per second of a rank."""
    fitted = Figure(value=bandwidth, source="fitted to the first row of table 2 (Hwang et al. 2023)")
    return replace(hardware, between=replace(hardware.between, bandwidth=fitted))


def _solve(difference: Callable[[float], float], low: float, high: float) -> float:
    return float(brentq(difference, low, high, rtol=1e-12))


def _table2(table: dict[str, Any]) -> tuple[list[Row], float, float]:
    hardware, first = load_hardware("a100"), table["rows"][0]
    volume = float(table["tokens"] * table["top_k"] * table["dim"] * table["element_bytes"])

    def exchange(ranks: int, bandwidth: float) -> float:
        machine = with_bandwidth(hardware, bandwidth)
        return 1000 * JOURNEYS * all_to_all(layout(ranks, 1, machine.processes_per_node), volume, machine)

    bandwidth = _solve(lambda b: exchange(first["ranks"], b) - first["all_to_all_ms"], 1e9, 1e12)
    # Every rank computes the same, however many there are: tokens and experts of a rank stay what they are
    computed = 1000 * _layer_seconds(table, hardware)
    left = first["total_ms"] - first["all_to_all_ms"]
    factor = left / computed
    rows = []
    for row in table["rows"]:
        fitted, moved = row is first, exchange(row["ranks"], bandwidth)
        total = moved + computed * factor
        rows += [
            Row("2", row["ranks"], "all-to-all, ms", row["all_to_all_ms"], moved, fitted),
            Row("2", row["ranks"], "step, ms", row["total_ms"], total, fitted),
            Row(
                "2",
                row["ranks"],
                "share of all-to-all, %",
                100 * row["all_to_all_ms"] / row["total_ms"],
                100 * moved / total,
                fitted,
            ),
        ]
    return rows, bandwidth, factor


def _layer_seconds(table: dict[str, Any], hardware: Hardware) -> float:
    """Computing of the layer's step on one rank: experts, rows carried."""
    dim, hidden, ranks = table["dim"], table["hidden"], table["rows"][0]["ranks"]
    experts = table["experts_per_rank"] * ranks
    once = CapacityPolicy(kind="fixed", factor=1.0)
    moe = MoEConfig(num_experts=experts, top_k=table["top_k"], capacity=CapacityConfig(train=once, eval=once))
    layer = ExpertLayer(0, 0, table["tokens"], dim, hidden, experts, table["top_k"], hidden, hidden + dim)
    at = Setting(1, "fp32")
    spread = Spread(layer, moe, ParallelConfig(ep_size=ranks), at, True, ranks, hardware.processes_per_node)
    costs = (*spread.experts(), *spread.carry())
    return sum(hardware.seconds(cost, "fp32") for cost in costs)


def _table7(table: dict[str, Any], hardware: Hardware) -> tuple[list[Row], dict[str, float]]:
    first = table["rows"][0]
    rows: list[Row] = []
    factors: dict[str, float] = {}
    for what in ("train", "infer"):
        seconds = _training if what == "train" else _inference
        dense, sparse = _run(table, None), {row["ranks"]: _run(table, row["ranks"]) for row in table["rows"]}
        rate = table["images"]
        times = {name: rate / first[f"{name}_{what}"] for name in ("dense", "moe")}
        slow = _factor(seconds, dense, hardware, first["ranks"], times["dense"])
        machine = hardware.scaled("A100 as in the Tutel paper", slow)
        carried = _factor(seconds, sparse[first["ranks"]], machine, first["ranks"], times["moe"], "route", "rows")
        machine = machine.scaled(machine.name, carried, "route", "rows")
        named = {"train": "training", "infer": "inference"}[what]
        factors |= {
            f"all work, {named}, times the description's": slow,
            f"routing and rows, {named}, times that": carried,
        }
        for row in table["rows"]:
            for name, run in (("dense", dense), ("moe", sparse[row["ranks"]])):
                predicted = rate / seconds(run, machine, row["ranks"])
                label = f"{'dense' if name == 'dense' else 'sparse'} {named}, images/s of a GPU"
                rows.append(Row("7", row["ranks"], label, row[f"{name}_{what}"], predicted, row is first))
    return rows, factors


def _factor(
    seconds: Callable[[RunConfig, Hardware, int], float],
    run: RunConfig,
    hardware: Hardware,
    ranks: int,
    wanted: float,
    *kinds: str,
) -> float:
    """How many times slower at `kinds` of work the hardware must be for `run` to take `wanted` seconds."""
    return _solve(lambda f: seconds(run, hardware.scaled(hardware.name, f, *kinds), ranks) - wanted, 1e-3, 1e3)


def _run(table: dict[str, Any], experts: int | None) -> RunConfig:
    """The model with so many experts, one for each rank; None = its dense twin."""
    once = {"kind": "fixed", "factor": 1.0}
    run = build(RunConfig, {"model": {"preset": table["preset"]}, "train": {"precision": "fp16"}})
    if experts is None:
        return with_overrides(run, {"model": {"moe": None, "moe_blocks": []}})
    over = {"num_experts": experts, "dispatcher": "padded", "capacity": {"train": once, "eval": once}}
    return with_overrides(run, {"model": {"moe": over}, "parallel": {"ep_size": experts}})


def _training(run: RunConfig, hardware: Hardware, ranks: int) -> float:
    return predict(_sized(run, ranks), Scene(hardware, ranks)).seconds


def _inference(run: RunConfig, hardware: Hardware, ranks: int) -> float:
    """Forward passes alone: nothing is summed, nothing is updated."""
    sized = _sized(run, ranks)
    images, precision = sized.train.batch_size // ranks, run.train.precision
    ahead, _ = dense_work(sized, hardware, images)
    total = hardware.seconds(ahead, precision)
    for spread in spreads_of(sized, Scene(hardware, ranks), images):
        for cost in (spread.experts()[0], spread.carry()[0]):
            total += hardware.seconds(cost, precision)
        total += 2 * spread.exchange(hardware) + spread.metadata(hardware)
    return total


def _sized(run: RunConfig, ranks: int) -> RunConfig:
    return replace(run, train=replace(run.train, batch_size=published()["table7"]["images"] * ranks))


def lines(rows: list[Row], constants: dict[str, float]) -> Iterator[str]:
    """A Markdown table of everything, and what was fitted."""
    yield "| table | GPUs | figure | published | predicted | error |"
    yield "|---|---:|---|---:|---:|---:|"
    for row in rows:
        error = "fitted" if row.fitted else f"{100 * row.error:+.1f} %"
        yield f"| {row.table} | {row.ranks} | {row.what} | {row.published:.1f} | {row.predicted:.1f} | {error} |"
    yield ""
    yield from (f"- {name}: {value:.3g}" for name, value in constants.items())
