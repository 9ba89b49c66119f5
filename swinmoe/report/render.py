"""`write_report`: figures, `report.md` and a self-contained `report.html` from one records file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from swinmoe.records import read_records
from swinmoe.report.figures import curve_figure
from swinmoe.report.headline import headline
from swinmoe.report.page import Picture, add_picture, as_yaml, drawn, flat, templates, write_whole
from swinmoe.report.patches import patch_sheet, samples
from swinmoe.report.routing_figures import (
    ClassTable,
    class_figure,
    class_tables,
    health_figure,
    health_metrics,
    load_figure,
)
from swinmoe.report.series import (
    Line,
    evaluated_weights,
    evaluation_curves,
    last,
    routing_traces,
    seeds_of,
    training_curves,
)
from swinmoe.report.summarise import ArmSummary, Summary, summary
from swinmoe.report.theme import DARK, LIGHT
from swinmoe.version import __version__


@dataclass(frozen=True)
class ReportPaths:
    """What `write_report` left behind."""

    markdown: Path
    html: Path
    figures: tuple[Path, ...]
    headline: str
    """What the report shows, in a few sentences, for a terminal."""


@dataclass(frozen=True)
class RoutingSection:
    """Everything about one sparse arm's experts."""

    arm: ArmSummary
    seed: int
    """The seed whose heat map, pictures and classes are shown; expert numbers mean nothing across seeds."""
    load: Picture
    health: Picture | None
    patches: Picture | None
    classes: Picture | None
    tables: Sequence[ClassTable]


def write_report(records_path: Path, output_dir: Path) -> ReportPaths:
    """Write `report.md`, `report.html` and `figures/*.png` into `output_dir` from the records of a run or a comparison.

    Works while the run is still going (and says so). Every file appears whole or not at all.

    Raises:
        CheckpointError: no records there, or a damaged line.
    """
    records = read_records(records_path)
    output_dir = Path(output_dir)
    numbers = summary(records)
    pictures: list[Picture] = []
    context = _context(records, numbers, pictures)
    for picture in pictures:
        write_whole(output_dir / picture.file, picture.light)
    markdown, html = output_dir / "report.md", output_dir / "report.html"
    write_whole(markdown, templates(autoescape=False).get_template("report.md.j2").render(context).encode())
    write_whole(html, templates(autoescape=True).get_template("report.html.j2").render(context).encode())
    return ReportPaths(markdown, html, tuple(output_dir / p.file for p in pictures), context["headline"].text)


def _context(records: Sequence[Line], numbers: Summary, pictures: list[Picture]) -> dict[str, Any]:
    """Everything the templates show; each picture is also appended to `pictures`."""
    run = next((line for line in reversed(records) if line["kind"] == "run"), {})
    configs = {arm.name: as_yaml(_arm_config(records, arm)) for arm in numbers.arms}
    return {
        "summary": numbers,
        "index": {arm.name: i for i, arm in enumerate(numbers.arms)},
        "speed": {d.arm: d.speed for d in numbers.differences if d.speed},
        "headline": headline(numbers),
        "curves": _curves(records, numbers, pictures),
        "weights": evaluated_weights(records),
        "routing": [section for arm in numbers.arms if (section := _routing(records, arm, pictures))],
        "config": as_yaml(run.get("config")),
        "arm_configs": {name: text for name, text in configs.items() if text},
        "facts": _facts(run, numbers),
        "environment": flat(run.get("environment") or {}),
        "notes": [str(line["text"]) for line in records if line["kind"] == "note" and line.get("text")],
        "light": LIGHT,
        "dark": DARK,
        "version": __version__,
    }


def _curves(records: Sequence[Line], numbers: Summary, pictures: list[Picture]) -> dict[str, Picture]:
    """Loss, held-out accuracy (training accuracy where nothing was evaluated) and held-out loss."""
    wanted = {
        "loss": (training_curves(records, "loss"), "training loss", False),
        "accuracy": (evaluation_curves(records, "accuracy"), f"{numbers.split} accuracy", True),
        "test_loss": (evaluation_curves(records, "loss"), f"{numbers.split} loss", False),
    }
    if not wanted["accuracy"][0]:
        wanted["accuracy"] = (training_curves(records, "accuracy"), "training accuracy", True)
    out = {}
    for name, (values, label, percent) in wanted.items():
        if values:
            make = partial(curve_figure, values, label, summary=numbers, percent=percent)
            out[name] = add_picture(pictures, name, f"{label.capitalize()} of every arm", partial(drawn, make))
    return out


def _routing(records: Sequence[Line], arm: ArmSummary, pictures: list[Picture]) -> RoutingSection | None:
    """The section of one arm; None for a dense arm, or before its first step is logged."""
    by_seed = {seed: routing_traces(records, arm.name, seed) for seed in seeds_of(records, arm.name)}
    by_seed = {seed: traces for seed, traces in by_seed.items() if traces}
    if not by_seed:
        return None
    seed = next((s for s in arm.seeds if s in by_seed), min(by_seed))
    add = partial(add_picture, pictures)
    load = add(
        f"load_{arm.name}",
        f"Share of tokens per expert over training, {arm.name}",
        partial(drawn, partial(load_figure, by_seed[seed])),
    )
    health = shown = classes = None
    if health_metrics(by_seed):
        health = add(
            f"routing_{arm.name}",
            f"Dropped tokens, entropies and imbalance over training, {arm.name}",
            partial(drawn, partial(health_figure, by_seed)),
        )
    if images := samples(records, arm.name, seed):
        shown = add(
            f"patches_{arm.name}",
            f"Test images with patches coloured by expert, {arm.name}",
            partial(patch_sheet, images, arm.num_experts or 1),
        )
    if tables := class_tables(records, arm.name, seed):
        classes = add(
            f"classes_{arm.name}",
            f"Share of each class's tokens per expert, {arm.name}",
            partial(drawn, partial(class_figure, tables)),
        )
    return RoutingSection(arm, seed, load, health, shown, classes, tables)


def _arm_config(records: Sequence[Line], arm: ArmSummary) -> Any:
    seeds = seeds_of(records, arm.name)
    return last(records, "arm", arm.name, seeds[0]).get("config") if seeds else None


def _facts(run: Line, numbers: Summary) -> list[tuple[str, str]]:
    """What was run on what, in a line of the header."""
    config = run.get("config") or {}
    base = config.get("base") or config
    data = (base.get("data") or {}).get("name")
    seeds = sorted({p.seed for p in numbers.progress})
    matched = {"active_params": "active parameters", "flops": "training FLOPs"}.get(numbers.match or "", numbers.match)
    found = [
        ("data", data),
        ("arms", ", ".join(arm.name for arm in numbers.arms)),
        ("matched on", matched),
        ("seeds", ", ".join(map(str, seeds))),
        ("begun", run.get("time")),
    ]
    return [(name, str(value)) for name, value in found if value]
