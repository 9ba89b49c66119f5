"""What a run is proven on: its own model, losses and mesh, without the draws that two ways of running cannot share.

Shapes: R ranks, b images of a micro-batch over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from swinmoe.config import CapacityPolicy, RunConfig
from swinmoe.data import Batch
from swinmoe.randomness import generator

SILENCED = {
    "model.drop_rate": 0.0,
    "model.attn_drop_rate": 0.0,
    "model.drop_path_rate": 0.0,
    "model.moe.experts.dropout": 0.0,
    "parallel.payload": "full",
}
"""Keys that the proof sets, and to what: masks are drawn per rank, and a rounded payload is not equal to anything."""
CLIP = 0.1
"""The largest bound of clipping that a proof has, for runs that clip. Gradients of stirred weights exceed it as a rule:
`ParallelProof.largest_clip_factor` tells whether every one did."""


def provable(run: RunConfig, *, world: int, steps: int, precision: str) -> tuple[RunConfig, tuple[str, ...]]:
    """`run` as it is proven, and what had to be changed, as `key=was -> is`.

    The batch is a few images per rank, the rate is at its peak from the first step, dropout is off, and the bound of
    clipping is at most `CLIP`. Length and warm-up are the proof's own and not among the notes.
    """
    micro = 3 * world if world > 1 else 4
    wanted: dict[str, Any] = {
        "schedule.warmup_steps": 0,
        "train.steps": steps,
        "train.epochs": None,
        "train.batch_size": micro * run.train.accumulation,
        "train.precision": precision,
    }
    notes = [
        f"{key}={was} -> {wanted[key]}"
        for key in ("train.batch_size", "train.precision")
        if (was := _look_up(run, key)) != wanted[key]
    ]
    for key, silent in SILENCED.items():
        was = _look_up(run, key)
        if key == "parallel.payload" and precision != "fp64":
            continue  # what training has is shown with what training sends
        if was is not None and was != silent:
            notes.append(f"{key}={was} -> {silent}")
            wanted[key] = silent
    limit = run.optim.clip_grad_norm
    if limit is not None and limit > CLIP:
        notes.append(f"optim.clip_grad_norm={limit} -> {CLIP}")
        wanted["optim.clip_grad_norm"] = CLIP
    for key, value in wanted.items():
        run = _with(run, key, value)
    run, stilled = _still_capacity(run, steps)
    notes += stilled
    return run, tuple(notes)


def _still_capacity(run: RunConfig, steps: int) -> tuple[RunConfig, list[str]]:
    """Adaptive factors stay the first ones: the reference sees no needs of past batches. Exact needs stay in force."""
    moe = run.model.moe
    if moe is None:
        return run, []
    stilled: list[str] = []

    def still(policy: CapacityPolicy, where: str) -> CapacityPolicy:
        if policy.kind != "adaptive" or policy.adapt.every > steps:
            return policy
        stilled.append(f"model.moe.capacity.{where}.adapt.every={policy.adapt.every} -> {steps + 1}")
        first = policy.adapt.clamp(policy.factor)
        return replace(policy, factor=first, adapt=replace(policy.adapt, every=steps + 1))

    layers = {
        name: own if own.train is None else replace(own, train=still(own.train, f"layers.{name}.train"))
        for name, own in (moe.capacity.layers or {}).items()
    }
    capacity = replace(moe.capacity, train=still(moe.capacity.train, "train"), layers=layers or None)
    return (_with(run, "model.moe.capacity", capacity), stilled) if stilled else (run, [])


def _look_up(config: Any, key: str) -> Any:
    """The value under a dotted key; None where a section on the way is null."""
    for part in key.split("."):
        config = None if config is None else getattr(config, part)
    return config


def _with(config: Any, key: str, value: Any) -> Any:
    head, _, rest = key.partition(".")
    return replace(config, **{head: _with(getattr(config, head), rest, value) if rest else value})


def shares_of(step: int, micro: int, images: int, world: int) -> list[int]:
    """How many of a micro-batch's `images` each rank has: equal at even steps; at odd ones any split, every other time
    with a rank that has none."""
    if step % 2 == 0 or world == 1:
        return [images * (rank + 1) // world - images * rank // world for rank in range(world)]
    busy = world - 1 if step % 4 == 1 else world
    draw = generator("verify", "shares", step, micro)
    cuts = sorted(torch.randint(images + 1, (busy - 1,), generator=draw).tolist())
    filled = [stop - start for start, stop in zip([0, *cuts], [*cuts, images], strict=True)]
    if busy < world:
        filled.insert((step // 4 + micro) % world, 0)
    return filled


def batches_of(run: RunConfig, step: int, device: torch.device) -> Iterator[Batch]:
    """The micro-batches (b images each, of all ranks) of a step: noise for pictures, any labels."""
    images = run.train.batch_size // run.train.accumulation
    dtype = torch.float64 if run.train.precision == "fp64" else torch.float32
    for micro in range(run.train.accumulation):
        draw = generator("verify", "images", run.seed, step, micro)
        pictures = torch.randn(images, run.model.in_chans, *run.model.img_size, generator=draw, dtype=torch.float64)
        labels = torch.randint(run.model.num_classes, (images,), generator=draw)
        yield Batch(
            images=pictures.to(device, dtype),
            targets=labels.to(device),
            soft_targets=None,
            indices=torch.arange(images),
        )


def part_of(batch: Batch, shares: list[int], rank: int) -> Batch:
    """The images of one rank."""
    first = sum(shares[:rank])
    mine = slice(first, first + shares[rank])
    return Batch(batch.images[mine], batch.targets[mine], None, batch.indices[mine])
