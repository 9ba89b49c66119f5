"""Checkpoints saved under one spread of experts and loaded under another: are all bits there, does the curve go on?

python tests/distributed/spreads.py [--eight]     prints the table of docs/results; --eight adds 4 experts on 8 ranks
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pool import Pool
from torch import Tensor

from swinmoe.checkpoint import Saver, form_slice_groups, load_checkpoint, open_checkpoint
from swinmoe.checkpoint.naming import expert_key
from swinmoe.config import RunConfig
from swinmoe.config.io import build, merge
from swinmoe.data import build_data
from swinmoe.parallel import gather_full, holders_of, make_mesh
from swinmoe.runtime import make_accelerator
from swinmoe.train.arm import Arm, make_arm
from swinmoe.train.place import place
from swinmoe.train.schedule import Length
from swinmoe.train.session import make_stream

RUN = {
    "model": {
        "preset": "swin_moe_micro",
        "in_chans": 1,
        "embed_dim": 8,
        "patch_size": 4,
        "num_heads": [1, 2],
        "drop_path_rate": 0.0,
        "moe": {"top_k": 1, "router": {"bias_update_rate": 0.01}, "losses": {"gshard": 0.01}},
    },
    "data": {"name": "digits", "limit": 64},
    "optim": {"base_lr": 0.003, "clip_grad_norm": 0.2},
    "train": {"steps": 6, "epochs": None, "batch_size": 16, "ema_decay": 0.9, "precision": "fp64"},
    "log": {"peak_flops": 1e11},
}
SAVED, STEPS = 3, 6
GROUPS = ("model", "average", "optimizer")


@dataclass(frozen=True)
class Spread:
    """Experts over processes."""

    name: str
    processes: int
    ep_size: int
    zero: bool = False
    shard_dense: bool = False


ONE, TWO, FOUR = Spread("1", 1, 1), Spread("ep 2", 2, 2), Spread("ep 4", 4, 4)
REPLICAS, DATA = Spread("dp x ep 2 x 2", 4, 2), Spread("dp 2", 2, 1)
SLICED = Spread("ep 4, sliced in 2", 4, 4)
ZERO_TWO, ZERO_FOUR = Spread("ZeRO dp 2", 2, 1, zero=True), Spread("ZeRO dp 4", 4, 1, zero=True)
ZERO_REPLICAS = Spread("ZeRO dp x ep 2 x 2", 4, 2, zero=True)
CUT_TWO, CUT_REPLICAS = (
    Spread("FSDP2 dp 2", 2, 1, shard_dense=True),
    Spread("FSDP2 dp x ep 2 x 2", 4, 2, shard_dense=True),
)
CUT_AND_ZERO = Spread("FSDP2 and ZeRO dp x ep 2 x 2", 4, 2, zero=True, shard_dense=True)
EIGHT = Spread("ep 8, sliced in 2", 8, 8)

Whole = dict[str, Tensor]
Run = Callable[..., list[Any]]


def start(spread: Spread, experts: int) -> tuple[Arm, Any]:
    """An arm of this process, untrained, and its stream of batches."""
    parallel = {"ep_size": spread.ep_size, "zero": spread.zero, "shard_dense": spread.shard_dense}
    own = {"model": {"moe": {"num_experts": experts}}, "parallel": parallel}
    run = build(RunConfig, merge(RUN, own))
    accelerator = make_accelerator("fp64", cpu=True)
    mesh = make_mesh(run.parallel, experts)
    bundle = build_data(run.data, seed=run.seed)
    stream = make_stream(run, bundle, mesh)
    return make_arm("model", run, mesh, accelerator, Length(steps=STEPS), stream.steps_per_epoch), stream


def go_on(arm: Arm, stream: Any, stop: int) -> list[float]:
    """Train until `stop`; the loss of each step."""
    losses = []
    for batches in stream.iterate(arm.step, stop):
        arm.train_step(tuple(place(batch, arm.device, "fp64") for batch in batches))
        losses.append(arm.take_log()["loss"])
    return losses


def whole(arm: Arm) -> Whole:
    """Everything that the arm holds, put together from all ranks without the checkpoint's code, by names in files."""
    parameters = dict(arm.raw.named_parameters())
    found: Whole = {}
    average = {} if arm.average is None else arm.average.module.state_dict()
    for group, state in (("model", arm.raw.state_dict()), ("average", average)):
        for name, value in state.items():
            full = gather_full(value, parameters[name], arm.mesh) if name in parameters else value
            found |= _named(f"{group}/", name, full, "")
    for name, parameter in parameters.items():
        for key, value in arm.optimizer.state.get(parameter, {}).items():
            value = _from_holders(value, holders_of(arm.optimizer, parameter), arm)
            full = gather_full(value, parameter, arm.mesh) if value.shape == parameter.shape else value
            found |= _named("optimizer/", name, full, f"#{key}")
    return {name: value.detach().clone() for name, value in found.items()}


def _from_holders(value: Tensor, holders: frozenset[int] | None, arm: Arm) -> Tensor:
    """A moment that some ranks hold, on all: each has that of its own place in an expert group, or the only one."""
    if holders is None:
        return value
    everyone = [torch.empty(value.shape, dtype=value.dtype) for _ in range(arm.mesh.world)]
    own = value if arm.mesh.rank in holders else torch.zeros(value.shape, dtype=value.dtype)
    dist.all_gather(everyone, own.contiguous())
    at_my_place = [rank for rank in sorted(holders) if rank % arm.mesh.ep_size == arm.mesh.ep_rank]
    return everyone[at_my_place[0] if len(holders) > 1 else min(holders)]


def _named(group: str, name: str, value: Tensor, key: str) -> Whole:
    if expert_key(name, 0) is None or value.dim() == 0:
        return {f"{group}{name}{key}": value}
    return {f"{group}{expert_key(name, expert)}{key}": part for expert, part in enumerate(value)}


def save_at(folder: Path, spread: Spread, experts: int, asynchronous: bool = False) -> tuple[Whole, list[float]]:
    """Train, save at step `SAVED`, train on: what was held when saving, and the losses after it."""
    arm, stream = start(spread, experts)
    go_on(arm, stream, SAVED)
    held = whole(arm)
    form_slice_groups(arm.stacks, arm.mesh)
    saver = Saver(folder, arm.mesh, keep_last=1, asynchronous=asynchronous)
    values = arm.values()
    saver.save(SAVED, {"model": arm.content()}, {"arms": {"model": values}}, None)
    losses = go_on(arm, stream, STEPS)
    saver.finish()
    return held, losses


def load_at(folder: Path, spread: Spread, experts: int) -> tuple[Whole, list[float]]:
    """Load what was saved, and train on: what is held after loading, and the losses."""
    arm, stream = start(spread, experts)
    stored = open_checkpoint(folder / f"step-{SAVED:08d}")
    arm.load(stored, "", stored.state["arms"]["model"])
    held = whole(arm)
    return held, go_on(arm, stream, STEPS)


@dataclass(frozen=True)
class Cell:
    """One way there and back."""

    saved: Spread
    loaded: Spread
    bit_equal: bool
    furthest: float
    """Largest relative difference of a loss after it."""


def files_equal(folder: Path, held: Whole) -> bool:
    """The checkpoint's tensors are those held, bit by bit, and no others."""
    stored = load_checkpoint(folder / f"step-{SAVED:08d}").tensors
    files = {f"{group}/{name}": tensor for group, named in stored.items() for name, tensor in named.items()}
    return same(files, held)


def same(a: Whole, b: Whole) -> bool:
    """Names, shapes and bits."""
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def cells(folder: Path, spreads: list[Spread], experts: int, run: Callable[[Spread], Run]) -> list[Cell]:
    """Save under each spread, load under each other (and its own)."""
    found = []
    for number, saved in enumerate(spreads):
        place_of = folder / f"{experts}-{number}"
        answers = run(saved)(save_at, place_of, saved, experts, number % 2 == 1)
        held, losses = answers[0]
        assert files_equal(place_of, held), saved.name
        for loaded in spreads:
            results = run(loaded)(load_at, place_of, loaded, experts)
            equal = all(same(own, held) for own, _ in results)
            furthest = max(abs(a - b) / abs(b) for _, own in results for a, b in zip(own, losses, strict=True))
            found.append(Cell(saved, loaded, equal, furthest))
    return found


def rows(found: list[Cell]) -> list[str]:
    """The table in Markdown: largest relative difference of the losses, `=` before it where all bits came back."""
    spreads = list(dict.fromkeys(cell.loaded for cell in found))
    lines = [f"| saved at \\ loaded at | {' | '.join(s.name for s in spreads)} |", "|---" * (len(spreads) + 1) + "|"]
    for saved in spreads:
        own = {cell.loaded: cell for cell in found if cell.saved == saved}
        shown = [f"{'=' if own[s].bit_equal else 'DIFFERS'} {own[s].furthest:.0e}" for s in spreads]
        lines.append(f"| {saved.name} | {' | '.join(shown)} |")
    return lines


def runner(pools: dict[int, Any]) -> Callable[[Spread], Run]:
    """Functions on a spread's processes; on one, here."""

    def run(spread: Spread) -> Run:
        if spread.processes == 1:
            return lambda function, *arguments: [function(*arguments)]
        pool = pools[spread.processes]
        return lambda function, *arguments: pool.run(function, *arguments, timeout=600.0)

    return run


def _table() -> None:
    pools = {n: Pool(n) for n in (2, 4, *([8] if "--eight" in sys.argv else []))}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            few = cells(Path(scratch), [ONE, DATA, TWO, REPLICAS, SLICED], 2, runner(pools))
            extra = [EIGHT] if 8 in pools else []
            more = cells(Path(scratch), [ONE, DATA, TWO, FOUR, REPLICAS, *extra], 4, runner(pools))
            zero = [ONE, REPLICAS, ZERO_TWO, ZERO_FOUR, ZERO_REPLICAS, CUT_TWO, CUT_REPLICAS, CUT_AND_ZERO]
            shared = cells(Path(scratch) / "shared", zero, 4, runner(pools))
    finally:
        for pool in pools.values():
            pool.close()
    titled = {"2 experts": few, "4 experts": more, "4 experts, with ZeRO and FSDP2": shared}
    print("\n\n".join(f"{title}\n\n" + "\n".join(rows(found)) for title, found in titled.items()))


if __name__ == "__main__":
    _table()
