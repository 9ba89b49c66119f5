"""`swinmoe plan`: what a run would take on machines that are not here, and how best to spread it over them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from swinmoe.commands.outfile import check_out
from swinmoe.config import RunConfig
from swinmoe.config.io import build, dump, load, with_overrides
from swinmoe.errors import ConfigError
from swinmoe.profiling.plan.calibrate import calibrate
from swinmoe.profiling.plan.dry_run import DryRun, dry_run
from swinmoe.profiling.plan.hardware import Hardware, load_hardware
from swinmoe.profiling.plan.predict import Prediction, Scene, at_batch, predict
from swinmoe.profiling.plan.refine import Measured, refine
from swinmoe.profiling.plan.search import Option, search
from swinmoe.records import read_records
from swinmoe.runtime import launched_rank, launched_world, start_processes, stop_processes
from swinmoe.runtime.accelerator import wants_cpu
from swinmoe.verify.launch import run_on

SHOWN = 3
"""Ways listed for each number of ranks."""
_GIB = 2**30


@dataclass(frozen=True)
class Question:
    """What is asked for."""

    ranks: tuple[int, ...]
    hardware: str = "h100"
    processes_per_node: int | None = None
    batch: int | None = None
    imbalance: float | None = None

    def __post_init__(self) -> None:
        if self.imbalance is not None and not self.imbalance >= 1:
            raise ConfigError(
                f"--imbalance {self.imbalance} must be at least 1: rows of the busiest rank over the mean"
            )
        for name in ("processes_per_node", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")


def parse_ranks(text: str) -> tuple[int, ...]:
    """`1,8,64` as numbers.

    Raises:
        ConfigError: anything but numbers from 1 up, with commas between.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"--ranks {text}: give numbers from 1 up with commas between, e.g. 1,8,64,4096")
    return tuple(int(word) for word in words)


def run_refinement(out: Path, records: Sequence[Path], question: Question) -> None:
    """Scale a machine's figures by steps that `profile model` has measured on it, and write it as YAML.

    Args:
        out: the new description.
        records: of training steps; those with balance forced count, where there are any.
        question: its `hardware` is what is scaled.

    Raises:
        ConfigError: no training step of a whole model in the records, or no folder for `out`.
    """
    check_out("--calibrate", out)
    named_steps = [step for path in records for step in measured_steps(path)]
    if not named_steps:
        named = ", ".join(map(str, records))
        raise ConfigError(
            f"--refine {named}: no training step of a whole model in it; make one with swinmoe profile model CONFIG "
            "--out FOLDER and give FOLDER/records.jsonl"
        )
    known = machine(question)
    steps = [step for _, step in named_steps]
    found, factors = refine(known, steps)
    out.write_text(f"# {found.name}, scaled by {len(steps)} steps\n{found.as_yaml()}", encoding="utf-8")
    table = _table("step", "ranks", "measured ms", "before", "after", left="step")
    for name, step in named_steps:
        before, after = (
            predict(step.run, Scene(hardware, step.world, imbalance=1.0)).seconds for hardware in (known, found)
        )
        off = [f"{100 * (value / step.seconds - 1):+.1f} %" for value in (before, after)]
        table.add_row(name, str(step.world), f"{1000 * step.seconds:.1f}", *off)
    console = Console(stderr=True, highlight=False)
    console.print(table)
    slower = ", ".join(f"{name} {factor:.2f}" for name, factor in factors.items())
    console.print(f"times as slow as described: {slower}", markup=False, soft_wrap=True)
    console.print(f"{out}: for swinmoe plan --hardware {out}", markup=False, soft_wrap=True)


def measured_steps(path: Path) -> list[tuple[str, Measured]]:
    """The training steps in records of `profile model`, by name."""
    found = []
    for line in read_records(path):
        if line["kind"] == "measurement" and line.get("run") is not None and line["variant"]["backward"]:
            ms = line.get("balanced_ms") or line["ms"]["median"]
            step = Measured(build(RunConfig, line["run"]), line["variant"]["world"], ms / 1000)
            found.append((line["name"], step))
    return found


def run_calibration(out: Path, *, processes: int | None, rounds: int) -> int:
    """Measure this machine and write it as YAML; the exit status.

    Raises:
        ConfigError: `processes` below 1 or beside a launcher that started another number; `out` cannot be a
            file.
    """
    world = launched_world()
    check_out("--calibrate", out)
    if processes is not None and (processes < 1 or world not in (1, processes)):
        raise ConfigError(
            f"--processes {processes} must be at least 1, and under a launcher, which started {world}, left away"
        )
    if world == 1 and processes is not None and processes > 1:
        return run_on(processes, ["plan", "--calibrate", str(out), "--rounds", str(rounds)])
    console = Console(stderr=True, highlight=False, quiet=launched_rank() != 0)
    start_processes(cpu=wants_cpu())
    device = torch.device("cpu" if wants_cpu() else f"cuda:{torch.cuda.current_device()}")
    found = calibrate(device, rounds=rounds, say=console.print)
    stop_processes()
    if launched_rank() == 0:
        out.write_text(f"# {found.name}\n{found.as_yaml()}", encoding="utf-8")
        console.print(f"{out}: for swinmoe plan --hardware {out}", markup=False, soft_wrap=True)
    return 0


def run_dry(config: Path, overrides: list[str], question: Question, world: int, *, as_json: bool = False) -> int:
    """Step a config on `world` ranks that are not there, and show what was planned and found; the exit status: 0 equal,
    1 not.

    Raises:
        ConfigError: a batch or experts that cannot be spread over so many ranks.
    """
    resolved = at_batch(load(RunConfig, config, overrides), world, question.batch)
    found = dry_run(resolved, machine(question), world)
    if as_json:
        print(json.dumps({**asdict(found), "holds": found.holds}, indent=1))
    else:
        show_dry(found, Console(highlight=False))
    return 0 if found.holds else 1


def show_dry(found: DryRun, console: Console) -> None:
    """Print who holds what, and every figure planned and found."""
    for look in found.looks:
        shared, same = len(look.neighbours), len(look.replicas)
        where = f"{look.experts}, among {shared} rank(s), {same} of which set(s) there are"
        console.print(f"rank {look.rank} of {found.world}: {where}", markup=False, soft_wrap=True)
        table = _table("", "planned", "found", "", left="")
        for check in look.checks:
            verdict = "" if check.holds else "DIFFERS"
            table.add_row(check.what, f"{check.planned:.6g}", f"{check.found:.6g}", verdict)
        console.print(table)
    for change in found.set_aside:
        console.print(f"set aside: {change}", markup=False, soft_wrap=True)
    console.print("the plan holds" if found.holds else "the plan does NOT hold", markup=False)


def run(
    config: Path, overrides: list[str], question: Question, *, as_json: bool = False, out: Path | None = None
) -> None:
    """Predict, rank, show; write the best as a config.

    Raises:
        ConfigError: a config, a number of ranks or a machine that does not fit together; `out` that cannot be a file,
            for several numbers of ranks, or where nothing fits into memory.
    """
    if out is not None:
        check_out("--out", out)
    resolved = load(RunConfig, config, overrides)
    if out is not None and len(question.ranks) != 1:
        raise ConfigError(f"--out {out} takes the best way for one number of ranks; --ranks names {question.ranks}")
    hardware = machine(question)
    found = {
        world: search(resolved, Scene(hardware, world, question.imbalance), question.batch) for world in question.ranks
    }
    if as_json:
        print(json.dumps({str(world): [_tree(option) for option in found[world]] for world in found}, indent=1))
    else:
        show(hardware, found, Console(highlight=False))
    if out is not None:
        write_best(resolved, found[question.ranks[0]], hardware, out)


def machine(question: Question) -> Hardware:
    """The hardware asked for."""
    hardware = load_hardware(question.hardware)
    size = question.processes_per_node
    return hardware if size is None else replace(hardware, processes_per_node=size)


def show(hardware: Hardware, found: dict[int, list[Option]], console: Console) -> None:
    """Print the best ways for each number of ranks, where the time of the best goes, and the keys that set it."""
    console.print(f"{hardware.name}; {hardware.processes_per_node} ranks a node", markup=False, soft_wrap=True)
    ways = _table("ranks", "dp", "ep", "travels", "chunks", "step ms", "images/s", "GiB", left="travels")
    shares = _table("ranks", "dense", "experts", "routing", "exchange", "sums", "update", "sent MB")
    for options in found.values():
        for option in options[:SHOWN]:
            ways.add_row(*_row(option))
        if options[0].prediction.fits:
            shares.add_row(*_shares(options[0].prediction))
    console.print(ways)
    if shares.row_count:
        console.print("\nWhere the time of the best goes", style="bold")
        console.print(shares)
    for world, options in found.items():
        console.print()
        console.print(_verdict(world, options, hardware), markup=False, soft_wrap=True)


def _table(*names: str, left: str = "") -> Table:
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, justify="left" if name == left else "right", no_wrap=name != left)
    return table


def _verdict(world: int, options: list[Option], hardware: Hardware) -> str:
    if not options[0].prediction.fits:
        return _too_large(world, options, hardware)
    words = " ".join(f"{key}={_word(value)}" for key, value in options[0].overrides.items())
    out = sum(not option.prediction.fits for option in options)
    return f"{world} ranks: {words}" + (f"\n  {out} of {len(options)} ways do not fit into memory" if out else "")


def _row(option: Option) -> Sequence[str]:
    p, parallel = option.prediction, option.run.parallel
    return (
        str(p.world),
        str(p.world // parallel.ep_size),
        str(parallel.ep_size),
        _travel(option),
        str(parallel.chunks),
        f"{1000 * p.seconds:.1f}",
        f"{p.images_per_second:.0f}",
        _gib(p.memory.total) + ("" if p.fits else " too large"),
    )


def _gib(size: float) -> str:
    """With a digit that differs, for small models too."""
    return f"{size / _GIB:.1f}" if size >= 10 * _GIB else f"{size / _GIB:.3g}"


def _shares(p: Prediction) -> Sequence[str]:
    parts = (p.dense, p.experts, p.moe_other, p.exchange, p.sync, p.update)
    return (str(p.world), *(f"{100 * part / p.seconds:.0f} %" for part in parts), f"{p.bytes_sent / 1e6:.0f}")


def _travel(option: Option) -> str:
    parallel, moe = option.run.parallel, option.run.model.moe
    words = []
    if parallel.weight_group > 1:
        words.append(f"weights of {parallel.weight_group}")
    if parallel.token_group > 1:
        words.append(f"tokens {parallel.exchange}")
    if moe is not None and parallel.ep_size > moe.num_experts:
        words.append(f"{parallel.ep_size // moe.num_experts} slices")
    if option.prediction.micro_batches > 1:
        words.append(f"{option.prediction.micro_batches} micro-batches")
    if option.run.model.grad_checkpointing:
        words.append("recomputed")
    return ", ".join(words) or "nothing"


def _too_large(world: int, options: list[Option], hardware: Hardware) -> str:
    least = min(options, key=lambda option: option.prediction.memory.total).prediction.memory
    usable = hardware.memory.value - hardware.reserved.value
    return (
        f"{world} ranks: nothing fits. The least takes {least.total / _GIB:.1f} GiB a rank of {usable / _GIB:.1f}: "
        f"parameters {(least.dense + least.experts) / _GIB:.1f}, gradients {least.gradients / _GIB:.1f}, moments "
        f"{least.moments / _GIB:.1f}, activations {least.activations / _GIB:.1f}, expert rows "
        f"{least.dispatch / _GIB:.1f}; use more ranks, a smaller --batch, or ZeRO"
    )


def _tree(option: Option) -> dict[str, Any]:
    return {"overrides": option.overrides, **option.prediction.as_json()}


def _word(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def nested(overrides: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    tree: dict[str, Any] = {}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return tree


def write_best(resolved: RunConfig, options: list[Option], hardware: Hardware, out: Path) -> None:
    """The config with the best way's keys laid on top, ready for `swinmoe train`; what was laid on top in its header.

    Raises:
        ConfigError: nothing fits into memory.
    """
    best = options[0]
    if not best.prediction.fits:
        raise ConfigError(_too_large(best.prediction.world, options, hardware))
    words = "\n".join(f"#   {key}={_word(value)}" for key, value in best.overrides.items())
    p = best.prediction
    header = (
        f"# Planned for {p.world} ranks of {hardware.name}: {1000 * p.seconds:.1f} ms a step, "
        f"{p.images_per_second:.0f} images/s,\n# {p.memory.total / _GIB:.1f} GiB a rank. Laid on top of the config:\n"
    )
    out.write_text(header + words + "\n" + dump(with_overrides(resolved, nested(best.overrides))), encoding="utf-8")
