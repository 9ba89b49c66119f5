"""`swinmoe train`: train one model from a config."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from swinmoe.config import RunConfig
from swinmoe.config.io import load
from swinmoe.config.shrink import shrink
from swinmoe.errors import ConfigError
from swinmoe.runtime import launched_rank, launched_world
from swinmoe.train import train


def run(config: Path, overrides: list[str], *, shrunk: bool, trace: str | None = None) -> None:
    """Load `config`, train, say where the results are; `trace`: the steps to trace, as `10:13` or `10`."""
    resolved = load(RunConfig, config, overrides)
    if shrunk:
        resolved = shrink(resolved)
    console = Console(stderr=True)
    if trace is None:
        folder, arm = train(resolved)
    else:
        from swinmoe.profiling.trace import StepTracer, of_rank

        first, last = parse_steps(trace)
        folder = Path(resolved.output_dir) / resolved.name
        path = of_rank(folder / f"trace-{first}-{last}.json", launched_rank(), launched_world())
        tracer = StepTracer(first, last, path)
        try:
            folder, arm = train(resolved, around_step=tracer)
        finally:
            tracer.close()
        if arm.mesh.rank == 0:
            said = f"trace: {tracer.written}" if tracer.written else f"no trace: the run did not train steps {trace}"
            console.print(said, markup=False, soft_wrap=True)
    if arm.mesh.rank == 0:
        console.print(f"records, checkpoints and config: {folder}", markup=False)


def parse_steps(text: str) -> tuple[int, int]:
    """`10:13` as (10, 13), `10` as (10, 10); steps count from 1.

    Raises:
        ConfigError: anything else.
    """
    first, _, last = text.partition(":")
    if first.isdecimal() and (last or first).isdecimal() and 1 <= int(first) <= int(last or first):
        return int(first), int(last or first)
    raise ConfigError(f"--trace {text!r} names no steps; give the first and the last, counted from 1, e.g. 10:13")
