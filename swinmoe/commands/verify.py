"""`swinmoe verify parallel`: is training on this mesh training on one process?"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.status import Status
from rich.table import Table

from swinmoe.config import RunConfig
from swinmoe.config.io import load
from swinmoe.config.shrink import shrink
from swinmoe.errors import ConfigError
from swinmoe.runtime import launched_rank, launched_world, stop_processes
from swinmoe.verify import ParallelProof, verify_parallel
from swinmoe.verify.launch import run_on

_SECONDS_BETWEEN_LINES = 10.0
_SHOWN = 6
"""Parameters listed, those with the largest differences."""


def run(
    config: Path, overrides: list[str], *, steps: int, processes: int | None, json_path: Path | None, full_size: bool
) -> int:
    """Prove `config`'s mesh, show how far it is from one process; the exit status: 0 proven, 1 not.

    Raises:
        ConfigError: `processes` beside a launcher that started another number, or a config that does not fit.
    """
    resolved = load(RunConfig, config, overrides)
    if steps < 1 or (processes is not None and processes < 1):
        raise ConfigError(f"--steps {steps} and --processes {processes} must be at least 1")
    world = launched_world()
    if world > 1:
        if processes not in (None, world):
            raise ConfigError(
                f"--processes {processes} under a launcher that started {world}; leave one of the two away"
            )
    elif (processes := processes or max(2, resolved.parallel.ep_size)) > 1:
        argv = ["verify", "parallel", str(config), *overrides, "--steps", str(steps)]
        argv += ["--json", str(json_path)] if json_path else []
        return run_on(processes, argv + ["--full-size"] * full_size)
    return _prove(resolved if full_size else shrink(resolved), steps, json_path)


def _prove(run: RunConfig, steps: int, json_path: Path | None) -> int:
    console = Console(stderr=True, highlight=False, quiet=launched_rank() != 0)
    proofs = []
    for dtype in (torch.float64, torch.float32):
        what = str(dtype).removeprefix("torch.")
        with console.status(what) as status:
            tell = _teller(console, status, what, steps)
            proofs.append(verify_parallel(run, steps=steps, dtype=dtype, on_step=tell))
    stop_processes()
    proof, single = proofs
    if launched_rank() == 0:
        show(proof, single, Console(highlight=False))
        if json_path is not None:
            found = {"float64": proof.as_json(), "float32": single.as_json()}
            json_path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if proof.proven else 1


def show(proof: ParallelProof, single: ParallelProof, console: Console) -> None:
    """Print what float64 proves and what float32 has."""
    console.print(f"{proof.spread}; {proof.steps} steps against one process on the same batches", soft_wrap=True)
    table = Table("largest relative difference", "float64", "float32")
    table.add_column("where (float64)", overflow="fold")
    table.add_row("loss", _figure(proof.loss_difference), _figure(single.loss_difference))
    table.add_row("norm of the gradients", _figure(proof.norm_difference), _figure(single.norm_difference))
    worst = sorted(proof.gradients, key=lambda name: proof.gradients[name], reverse=True)[:_SHOWN]
    for place, name in enumerate(worst):
        label = "gradients" if place == 0 else ""
        table.add_row(label, _figure(proof.gradients[name]), _figure(single.gradients[name]), name)
    name, value = proof.worst_parameter
    after = f"parameters after {proof.steps} steps"
    table.add_row(after, _figure(value), _figure(single.worst_parameter[1]), name)
    console.print(table)
    if proof.routed:
        console.print(f"choices dropped: {proof.dropped} of {proof.routed}", markup=False)
    active = "never active" if proof.clip_factor == 1 else "active at every step"
    if proof.clip_factor < 1 <= proof.largest_clip_factor:
        active = "not active at every step"
    console.print(f"clip factors: {proof.clip_factor:.3g} to {proof.largest_clip_factor:.3g} ({active})")
    console.print(f"what ranks share is bit-equal: {'yes' if proof.bit_equal else 'NO'}")
    for note in proof.set_aside:
        console.print(f"set aside for the proof: {note}", markup=False)
    if proof.proven:
        console.print(f"proven: every difference is at most {proof.tolerance:.0e} in float64")
    else:
        console.print("NOT proven: " + "; ".join(proof.failures), markup=False)


def _figure(difference: float) -> str:
    return f"{difference:.1e}"


def _teller(console: Console, status: Status, what: str, steps: int) -> Callable[[int], None]:
    """Steps done, in the status line of a terminal, or every so often as a line."""
    said = time.monotonic()

    def tell(done: int) -> None:
        nonlocal said
        text = f"{what}: step {done} of {steps}"
        if console.is_terminal:
            status.update(text)
        elif time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            console.print(text)

    return tell
