"""`swinmoe tune`: capacity factors from data, and how tokens travel from measurements."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.status import Status
from rich.table import Column, Table

from swinmoe.commands.evaluate import parse_factors
from swinmoe.commands.telling import SECONDS_BETWEEN_LINES
from swinmoe.data import DataBundle, build_data
from swinmoe.errors import ConfigError
from swinmoe.profiling.session import ProfileSession, profile_session
from swinmoe.profiling.tune.batches import batches_for
from swinmoe.profiling.tune.capacity import FACTORS, Tell, Tuning, label, tune_capacity
from swinmoe.profiling.tune.choose import Asked, Point, points_lost
from swinmoe.profiling.tune.loads import drop_fraction
from swinmoe.profiling.tune.passes import Factor, Mode, at_factor
from swinmoe.profiling.tune.written import as_yaml, layer_policies, tuned_config, write_records
from swinmoe.records import read_records
from swinmoe.report import interval_name
from swinmoe.report.tune_figure import capacity_curves
from swinmoe.runtime import agree, from_first, launched_world
from swinmoe.train.opened import Opened, open_model
from swinmoe.train.pretrained import Which
from swinmoe.train.session import check_data_fits

MODES: dict[str, tuple[Mode, ...]] = {"both": ("train", "eval"), "train": ("train",), "eval": ("eval",)}
_TITLES = {"train": "training", "eval": "evaluation"}


@dataclass(frozen=True)
class CapacityOptions:
    """Of `swinmoe tune capacity`."""

    asked: Asked
    mode: str = "both"
    images: int = 2048
    processes: int | None = None
    """That share a batch; None: as many as a launcher started."""
    factors: tuple[Factor, ...] = FACTORS
    rounds: int = 7

    def __post_init__(self) -> None:
        for name in ("images", "processes", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} {value} must be at least 1")
        if self.mode not in MODES:
            raise ConfigError(f"--mode {self.mode}: use one of {', '.join(MODES)}")


def parse_asked(max_drop: float | None, within: float | None) -> Asked:
    """The constraint of the command line; `ConfigError` unless exactly one is given and means something."""
    if (max_drop is None) == (within is None):
        raise ConfigError(
            "say what capacity is to keep: --max-drop 0.01 (of every layer's choices) or --within 0.5 (points of "
            "accuracy below dropless); one of them"
        )
    if max_drop is not None and not 0 <= max_drop < 1:
        raise ConfigError(f"--max-drop {max_drop} must be in [0, 1): a share of the choices, e.g. 0.01")
    if within is not None and not 0 <= within < 100:
        raise ConfigError(f"--within {within} must be in [0, 100): points of accuracy, e.g. 0.5")
    return Asked(max_drop, within)


def parse_grid(text: str | None) -> tuple[Factor, ...]:
    """Factors to try; dropless as None."""
    if text is None:
        return FACTORS
    return tuple(None if factor == "dropless" else factor for factor in parse_factors(text, "--factors"))


def run_capacity(checkpoint: Path, rest: list[str], options: CapacityOptions, *, which: Which, out: Path | None) -> int:
    """Tune, show, write to the folder `out`; the exit status: 0 verified, 1 not. Of several processes each runs its own
    batches, and the first of them prints and writes what all found.

    Raises:
        SwinMoEError: see `open_model`; the model is dense; `out` holds records; or `options` are for another number of
            processes than a launcher started.
    """
    processes = _processes(options.processes)
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--out {str(out)!r} is a file; give a folder")
    settings = {"checkpoint": checkpoint, "arguments": rest, "weights": which, "options": options}
    with profile_session(out, settings) as session:
        opened = open_model(checkpoint, rest, which, spread=True)
        if not opened.model.moe_layers():
            raise ConfigError("tune capacity needs a sparse model, and this one is dense")
        bundle = build_data(opened.run.data, seed=opened.run.seed)
        agree({"the number of training images": len(bundle.train), "the number of test images": len(bundle.eval)})
        check_data_fits(opened.run, bundle)
        told = Console(stderr=True, highlight=False, quiet=not session.is_main)
        tunings = _tune(opened, bundle, options, processes, told)
        problem: OSError | None = None
        if session.is_main:
            try:
                _give_out(session, checkpoint, opened, options, processes, tunings, out)
            except OSError as error:
                problem = error
        if (problem := from_first(problem)) is not None:  # all end alike
            raise problem
        if out is not None:
            told.print(f"written to {out}: tuned.yaml, records.jsonl and tune.png", markup=False, soft_wrap=True)
    return int(any(tuning.verdict.failures for tuning in tunings))


def _processes(given: int | None) -> int:
    """That share a batch."""
    world = launched_world()
    if world > 1 and given not in (None, world):
        raise ConfigError(
            f"--processes {given} under a launcher that started {world}, each of which runs its own batches; leave "
            f"--processes out, or start one process for the batches of {given}"
        )
    return given or world


def _tune(opened: Opened, bundle: DataBundle, options: CapacityOptions, processes: int, told: Console) -> list[Tuning]:
    rank = opened.mesh.rank if opened.mesh.world > 1 else None
    found = []
    with told.status("reading images") as status:
        for mode in MODES[options.mode]:
            steps = batches_for(opened.run, bundle, mode, options.images, processes, rank)
            tell = _teller(told, status)
            found.append(
                tune_capacity(
                    opened, mode, steps, options.asked, factors=options.factors, rounds=options.rounds, tell=tell
                )
            )
    return found


def _give_out(
    session: ProfileSession,
    checkpoint: Path,
    opened: Opened,
    options: CapacityOptions,
    processes: int,
    tunings: list[Tuning],
    out: Path | None,
) -> None:
    console = Console(highlight=False)
    if (mesh := opened.mesh).world > 1:
        spread = "all experts on each" if mesh.ep_size == 1 else f"experts spread over {mesh.ep_size}"
        console.print(f"{mesh.world} processes, {spread}", markup=False)
    for tuning in tunings:
        show(tuning, console)
    if out is None:
        console.print("\n# model.moe.capacity.layers", markup=False)
        console.print(as_yaml(layer_policies(opened, tunings)), markup=False, soft_wrap=True)
        return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    workload = {
        "checkpoint": str(checkpoint),
        "weights": opened.source.weights,
        "images": options.images,
        "processes": processes,
        "launched": opened.mesh.world,
        "ep_size": opened.mesh.ep_size,
        "rounds": options.rounds,
        "device": str(opened.device),
    }
    session.begin("capacity", f"tune capacity {checkpoint}", workload)
    for tuning in tunings:
        write_records(session.records, tuning)
    comment = [f"Made by swinmoe tune capacity {checkpoint}, {now}, for batches of {processes} process(es)."]
    for tuning in tunings:
        comment += [f"{_TITLES[tuning.mode]}: {line}" for line in verdict_lines(tuning)]
    (out / "tuned.yaml").write_text(as_yaml(tuned_config(opened, tunings), comment), encoding="utf-8")
    (out / "tune.png").write_bytes(capacity_curves(read_records(out / "records.jsonl")))


def show(tuning: Tuning, console: Console) -> None:
    """The curves, the layers, and what the check found."""
    console.print(f"\n{_TITLES[tuning.mode]}: {tuning.asked}", markup=False)
    points = (*tuning.points, *tuning.layered)
    rounds = min(len(point.timing.ms) for point in points)
    curves = Table("capacity", "choices dropped", "accuracy", "ms a step", interval_name(rounds))
    for point in points:
        curves.add_row(*_cells(point))
    console.print(curves)
    setting = tuning.verdict.setting
    drops = ("dropped, chosen on", "dropped, checked on", "from dropless loads")
    busiest = ["busiest expert / mean"] + [f"busiest of {tuning.ep_size} ranks / mean"] * (tuning.ep_size > 1)
    layers = Table(Column("layer", no_wrap=True), "factor", *drops, *busiest)
    for layer, factor in setting.factors.items():
        predicted = drop_fraction(tuning.loads[layer], at_factor(tuning.own[layer], factor))
        found = (tuning.verdict.chosen.drops[layer], tuning.verdict.seen.drops[layer], predicted)
        loads = (tuning.expert_imbalance(layer), tuning.rank_imbalance(layer))
        cells = [f"{100 * drop:.2f} %" for drop in found] + [f"{load:.2f}" for load in loads if load is not None]
        layers.add_row(layer, label(factor), *cells)
    console.print(layers)
    for line in verdict_lines(tuning):
        console.print(line, markup=False, soft_wrap=True)


def verdict_lines(tuning: Tuning) -> list[str]:
    """What the recommendation did on the batches for checking, and whether that is what was asked."""
    verdict = tuning.verdict
    seen, dropless, timings = verdict.seen, verdict.reference, verdict.timings
    where = (
        "other images"
        if tuning.separate
        else "of the same images (there is one step: take smaller batches, or more data)"
    )
    lines = [
        f"checked on {len(seen.correct)} {where}: {100 * seen.drop_fraction:.2f} % dropped, accuracy "
        f"{100 * seen.accuracy:.2f} % ({points_lost(seen, dropless):+.2f} points below dropless), "
        f"{timings['recommended'].median:.1f} ms a step (dropless {timings['dropless'].median:.1f}, capacity as it is "
        f"now {timings['now'].median:.1f})"
    ]
    if verdict.failures:
        lines.append(f"NOT met: {'; '.join(verdict.failures)}. {_advice(tuning)}")
    else:
        held = "verified" if tuning.separate else "kept where it was chosen, on other images not checked"
        lines.append(f"{held}: {tuning.asked}")
    return lines


def _advice(tuning: Tuning) -> str:
    if all(factor is not None for factor in (next(iter(p.setting.factors.values())) for p in tuning.points)):
        return "Give larger --factors (dropless among them), or ask for less"
    batches = len(next(iter(tuning.loads.values())))
    return f"Give more --images or smaller batches (it was chosen on {batches}), or ask for less"


def _cells(point: Point) -> tuple[str, ...]:
    return (
        point.name,
        f"{100 * point.seen.drop_fraction:.2f} %",
        f"{100 * point.seen.accuracy:.2f} %",
        f"{point.timing.median:.1f}",
        f"{point.timing.low:.1f} to {point.timing.high:.1f}",
    )


def _teller(console: Console, status: Status) -> Tell:
    """What is being done: all of it on a terminal, a line every ten seconds elsewhere."""
    said = time.monotonic()

    def tell(text: str) -> None:
        nonlocal said
        if console.is_terminal:
            status.update(text)
        elif time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            console.print(text, markup=False, soft_wrap=True)

    return tell
