"""`swinmoe tune exchange`: how tokens or weights travel between these processes, chosen by measuring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table

from swinmoe.commands.outfile import check_out, refusal
from swinmoe.config import RunConfig
from swinmoe.config.io import load, merge, parse_overrides, read_yaml
from swinmoe.errors import ConfigError
from swinmoe.moe.dispatchers.tutel import tutel_serves
from swinmoe.profiling.session import ProfileSession, profile_session
from swinmoe.profiling.tune.exchange import step_times
from swinmoe.profiling.tune.remembered import RememberedWays, default_file, shape_of
from swinmoe.profiling.tune.ways import Trial, Way, possible, ratio, search
from swinmoe.profiling.tune.written import as_yaml
from swinmoe.report import interval_name
from swinmoe.runtime import agree, describe_environment, from_first, launched_local_world, launched_world
from swinmoe.verify.launch import run_on


@dataclass(frozen=True)
class ExchangeOptions:
    """Of `swinmoe tune exchange`."""

    rounds: int = 9
    backward: bool = True
    ep_sizes: tuple[int, ...] | None = None
    cache: Path | None = None
    again: bool = False
    """Measure even what is remembered."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"--rounds {self.rounds} must be at least 1")

    @property
    def argv(self) -> list[str]:
        """As words of a command line."""
        words = ["--rounds", str(self.rounds), "--training" if self.backward else "--inference"]
        words += ["--ep-sizes", ",".join(map(str, self.ep_sizes))] if self.ep_sizes is not None else []
        words += ["--cache", str(self.cache)] if self.cache is not None else []
        return words + ["--again"] * self.again


def parse_ep_sizes(text: str | None) -> tuple[int, ...] | None:
    """`"1,2"` -> (1, 2); `ConfigError` for anything but numbers from 1."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"--ep-sizes {text!r}: give numbers of ranks, e.g. 1,2,4")
    return tuple(dict.fromkeys(int(word) for word in words))


def run_exchange(
    config: Path, overrides: list[str], options: ExchangeOptions, *, processes: int | None, out: Path | None
) -> int:
    """Tune, show, write the config to the file `out`; the exit status.

    Raises:
        ConfigError: a dense config, no way to run it here, `out` that cannot be a file, or `processes` beside a
            launcher that started another number.
    """
    run = load(RunConfig, config, overrides)
    if run.model.moe is None:
        raise ConfigError(f"tune exchange needs a sparse model, and {str(config)!r} is dense")
    world = launched_world()
    if processes is not None and processes < 1:
        raise ConfigError(f"--processes {processes}: give a number of processes, 1 or more")
    if world == 1 and out is not None:
        check_out("--out", out)
    if world > 1 and processes not in (None, world):
        raise ConfigError(f"--processes {processes} under a launcher that started {world}; leave one of the two away")
    if world == 1 and processes is not None and processes > 1:
        argv = ["tune", "exchange", str(config), *overrides, *options.argv]
        return run_on(processes, argv + (["--out", str(out)] if out is not None else []))
    with profile_session(None, {"config": run, "options": options}) as session:
        refused = from_first(None if out is None else refusal("--out", out))  # all end alike; rank 0 will write
        if refused is not None:
            raise refused
        way, trials = _tune(run, world, options, session)
    if session.is_main:
        console = Console(highlight=False)
        show(run, way, trials, console)
        if out is not None:
            out.write_text(_config_with(config, overrides, way, trials), encoding="utf-8")
            Console(stderr=True, highlight=False).print(f"written: {out}", markup=False, soft_wrap=True)
    return 0


def _tune(run: RunConfig, world: int, options: ExchangeOptions, session: ProfileSession) -> tuple[Way, list[Trial]]:
    """The way to take, and the trials that led to it: none where it was remembered."""
    tell = _teller(session)
    remembered = RememberedWays(options.cache or default_file())
    dispatchers = ["ragged", "padded", *["tutel"] * tutel_serves(session.device.type)]
    agree({"the dispatchers that can be tried": dispatchers})
    # The config's own layout is tried first, whatever it is.
    tried = sorted({Way.of(run).dispatcher, *dispatchers})
    measured = {"backward": options.backward, "ep_sizes": options.ep_sizes, "dispatchers": tried}
    # Ranks may run on machines of several kinds; the key is rank 0's.
    device = str(describe_environment()["device"])
    if session.device.type == "cpu":
        device = f"cpu {describe_environment()['cpu']}"
    shape = from_first(shape_of(run, world, launched_local_world(), device, measured))
    known = from_first(remembered.find(shape) if session.is_main and not options.again else None)
    if known is not None and known.dispatcher in tried and possible(run, known, world):
        tell(f"remembered in {remembered.path}; --again measures anew")
        return known, []
    measure = partial(step_times, device=session.device, backward=options.backward, rounds=options.rounds, say=tell)
    trials = search(run, world, measure, dispatchers=dispatchers, ep_sizes=options.ep_sizes)
    last = trials[-1]
    if session.is_main:
        remembered.keep(shape, last.after, dict(last.tried)[last.after].median)
    return last.after, trials


def show(run: RunConfig, way: Way, trials: list[Trial], console: Console) -> None:
    """Print every trial and what to write into a config."""
    for trial in trials:
        own = trial.tried[0][1]
        interval = interval_name(len(own.ms))
        table = Table(Column(trial.choice, no_wrap=True), "ms", interval, "over the one before", interval)
        for tried, timing in trial.tried:
            middle, low, high = ratio(timing, own)
            mark = " *" if tried == trial.after else ""
            beside = ("", "") if tried == trial.before else (f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
            table.add_row(f"{tried}{mark}", f"{timing.median:.1f}", f"{timing.low:.1f} to {timing.high:.1f}", *beside)
        console.print(table)
    console.print(f"best here: {way}", markup=False, soft_wrap=True)
    if way == Way.of(run):
        console.print("that is what the config says", markup=False)
    console.print(as_yaml(way.overrides), markup=False, soft_wrap=True)


def _config_with(config: Path, overrides: list[str], way: Way, trials: list[Trial]) -> str:
    """The user's own file with overrides and the way laid on top; its comments are lost, its brevity is not."""
    tree = merge(merge(read_yaml(config), parse_overrides(overrides)), way.overrides)
    world = launched_world()
    comment = [f"{config} as swinmoe tune exchange has it run on {world} process{'es' if world > 1 else ''}: {way}."]
    if trials:
        last = trials[-1]
        comment.append(f"A step took {dict(last.tried)[last.after].median:.1f} ms there (torch {torch.__version__}).")
    return as_yaml(tree, comment)


def _teller(session: ProfileSession) -> Callable[[str], None]:
    console = Console(stderr=True, highlight=False, quiet=not session.is_main)
    return lambda text: console.print(text, markup=False, soft_wrap=True)
