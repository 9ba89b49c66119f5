"""`swinmoe evaluate`: what a trained model is worth."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from swinmoe.commands.telling import telling
from swinmoe.data import DataBundle, build_data
from swinmoe.errors import ConfigError
from swinmoe.records import ConfidenceBin
from swinmoe.report.evaluation import CapacityPoint, capacity_figure, reliability_figure
from swinmoe.runtime import describe_environment, stop_processes
from swinmoe.train.evaluate_model import AtCapacity, Pass, independence, look_at, sweep
from swinmoe.train.evaluate_scores import BEST, Calibration, ClassScore, by_class, calibration
from swinmoe.train.opened import Opened, open_model
from swinmoe.train.pretrained import Which
from swinmoe.train.session import check_data_fits

Factor = float | Literal["dropless"]


def run(checkpoint: Path, rest: list[str], *, which: Which, capacity: str | None, out: Path | None) -> None:
    """Evaluate `checkpoint`, print what came of it, and write it to the folder `out` if there is one. Several processes
    share the images; the first of them prints and writes.

    Raises:
        SwinMoEError: see `open_model`; or `capacity` is no list of factors.
    """
    factors = parse_factors(capacity) if capacity else []
    opened = open_model(checkpoint, rest, which, shared=True)
    bundle = build_data(opened.run.data, seed=opened.run.seed)
    check_data_fits(opened.run, bundle)
    size = opened.run.train.eval_batch_size
    main = opened.mesh.is_main
    with telling("evaluating") if main else nullcontext(_silent) as tell:
        found = look_at(opened, bundle.eval, size, tell)
    swept: list[AtCapacity] = []
    for factor in factors:  # one bar each
        with telling(f"capacity {factor}") if main else nullcontext(_silent) as tell:
            swept += sweep(opened, bundle.eval, size, [factor], lambda _: tell)  # called at once
    if main:
        _give_out(opened, bundle, found, swept, out)
    stop_processes()


def _silent(done: int, total: int) -> None:
    """Progress is told by the first process."""


def _give_out(opened: Opened, bundle: DataBundle, found: Pass, swept: list[AtCapacity], out: Path | None) -> None:
    result = as_tree(opened, bundle, found, swept)
    text = markdown(result)
    show(result, Console(highlight=False))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (out / "evaluation.md").write_text(text, encoding="utf-8")
        bins = [ConfidenceBin(**b) for b in result["calibration"]["bins"]]
        (out / "reliability.png").write_bytes(reliability_figure(bins, result["calibration"]["ece"]))
        if swept:
            points = [CapacityPoint(str(p["factor"]), p["accuracy"], p["drop_fraction"]) for p in result["capacity"]]
            (out / "capacity.png").write_bytes(capacity_figure(points))
        Console(stderr=True).print(
            f"written to {out}: evaluation.json, evaluation.md and pictures", markup=False, soft_wrap=True
        )


def parse_factors(text: str, option: str = "--capacity") -> list[Factor]:
    """`"0.5,1.0,dropless"` -> factors; `ConfigError`, naming the option, for anything else."""
    factors: list[Factor] = []
    for word in (part.strip() for part in text.split(",")):
        if word == "dropless":
            factors.append("dropless")
            continue
        try:
            number = float(word)
        except ValueError:
            number = -1.0
        if not 0 < number < float("inf"):
            raise ConfigError(
                f"{option} {text!r}: {word!r} is neither a factor above 0 nor 'dropless'; e.g. 0.5,1,1.25"
            )
        factors.append(number)
    return factors


def as_tree(opened: Opened, bundle: DataBundle, found: Pass, swept: list[AtCapacity]) -> dict[str, Any]:
    """Everything that was found, as JSON can hold it."""
    predictions, size = found.predictions, opened.run.train.eval_batch_size
    classes = by_class(predictions, bundle.num_classes)
    reliability: Calibration = calibration(predictions.confidence, predictions.correct)
    return {
        "checkpoint": opened.source.path,
        "weights": opened.source.weights,
        "data": {"name": opened.run.data.name, "split": bundle.eval_split, "images": len(predictions.targets)},
        "accuracy": predictions.accuracy(),
        "top5": predictions.accuracy(BEST) if bundle.num_classes > BEST else None,
        "loss": float(predictions.loss.mean()),
        "classes": [_class_tree(bundle, index, score) for index, score in enumerate(classes)],
        "calibration": asdict(reliability),
        "images_per_second": found.images_per_second,
        "batch_size": size,
        "device": str(opened.device),
        "precision": opened.run.train.precision,
        "routing": found.routing,
        "drop_fraction": found.drop_fraction,
        "processes": opened.mesh.world,
        "batches": asdict(independence(opened.model, found, -(-size // opened.mesh.world))),
        "capacity": [
            {
                "factor": point.factor,
                "accuracy": point.found.predictions.accuracy(),
                "top5": point.found.predictions.accuracy(BEST) if bundle.num_classes > BEST else None,
                "loss": float(point.found.predictions.loss.mean()),
                "routed": point.found.routed,
                "dropped": point.found.dropped,
                "drop_fraction": point.found.drop_fraction,
                "by_layer": {name: layer["drop_fraction"] for name, layer in point.found.routing.items()},
                "images_per_second": point.found.images_per_second,
            }
            for point in swept
        ],
        "environment": describe_environment(),
    }


def _class_tree(bundle: DataBundle, index: int, score: ClassScore) -> dict[str, Any]:
    names = bundle.class_names
    taken_for = None if score.taken_for is None else names[score.taken_for]
    return {**asdict(score), "name": names[index], "taken_for": taken_for}


def _lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    data = result["data"]
    rows = [
        ("images", f"{data['images']:,} of {data['name']}, {data['split']}"),
        ("accuracy", _percent(result["accuracy"])),
    ]
    if result["top5"] is not None:
        rows.append(("top-5 accuracy", _percent(result["top5"])))
    rows.append(("loss, nats", f"{result['loss']:.4f}"))
    rows.append(("expected calibration error", _percent(result["calibration"]["ece"])))
    several = f"{result['processes']} processes, " if result["processes"] > 1 else ""
    how = f"{several}{result['device']}, batch {result['batch_size']}, {result['precision']}, without loading"
    rows.append(("images per second", f"{result['images_per_second']:.0f} ({how})"))
    rows.append(("batches", result["batches"]["said"]))
    return rows


def show(result: dict[str, Any], console: Console) -> None:
    """Print the main figures, and the sweep."""
    weights = ", moving average" if result["weights"] == "average" else ""
    console.print(f"{result['checkpoint']}{weights}", markup=False)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for row in _lines(result):
        table.add_row(*row)
    console.print(table)
    weakest = sorted((c for c in result["classes"] if c["count"]), key=lambda c: float(c["accuracy"]))[:5]
    named = (
        f"{c['name']} {_percent(c['accuracy'])}" + (f" ({c['taken_for']})" if c["taken_for"] else "") for c in weakest
    )
    console.print("hardest classes (taken for): " + ", ".join(named), markup=False)
    if result["capacity"]:
        swept = Table("capacity factor", "accuracy", "choices dropped", "images per second")
        for cells in _swept(result):
            swept.add_row(*cells)
        console.print(swept)


def _swept(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (
            str(point["factor"]),
            _percent(point["accuracy"]),
            _percent(point["drop_fraction"]),
            f"{point['images_per_second']:.0f}",
        )
        for point in result["capacity"]
    ]


def markdown(result: dict[str, Any]) -> str:
    """The same with every class, for a page."""
    out = [f"# {result['checkpoint']}", ""]
    out += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in _lines(result)), ""]
    out += ["![accuracy by confidence](reliability.png)", ""]
    if result["capacity"]:
        out += [
            "## Capacity",
            "",
            "| factor | accuracy | choices dropped | images per second |",
            "|---|---:|---:|---:|",
        ]
        out += [f"| {' | '.join(row)} |" for row in _swept(result)]
        out += ["", "![accuracy and drops by capacity](capacity.png)", ""]
    out += [
        "## Classes",
        "",
        "| class | images | recognised | precision | most taken for |",
        "|---|---:|---:|---:|---|",
    ]
    for score in result["classes"]:
        cells = (score["name"], str(score["count"]), _percent(score["accuracy"]), _percent(score["precision"]))
        out.append(f"| {' | '.join(cells)} | {score['taken_for'] or ''} |")
    return "\n".join(out) + "\n"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"
