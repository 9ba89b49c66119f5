"""A pairwise cover of the ways to spread an expert layer: few cells in which every two choices meet.

A cell is one choice per axis. Choices are what a mesh comes down to, not what its config says: 2DH with one node, or
one rank per node, is a flat exchange in two calls, and is no cell here (the random cases have it). What the config
refuses is no cell either.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np

from swinmoe.config import (
    BalanceLossConfig,
    CapacityConfig,
    CapacityPolicy,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    RouterConfig,
    RunConfig,
    TrainConfig,
)
from swinmoe.errors import ConfigError
from swinmoe.verify import ParallelProof

Choice = Any
Shape = tuple[int, int] | None
WEIGHT_GROUP = {"nothing": 1, "tokens": 1, "both by 2": 2, "both by 3": 3}
"""Who travels -> ranks that gather each other's weights; where weights alone do, all of an expert group."""


@dataclass(frozen=True)
class Cell:
    """One choice per axis."""

    spread: tuple[int, int, int]
    """(processes, ep_size, num_experts)"""
    travel: tuple[str, Shape, int]
    """(who, 2DH's nodes x ranks per node or None for flat, chunks): one axis, since each means little without the
    others"""
    layout: str
    capacity: str
    training: str
    top_k: int
    balance: str

    @property
    def processes(self) -> int:
        return self.spread[0]

    @property
    def drops(self) -> bool:
        """True if the cell claims to drop tokens."""
        return self.capacity != "dropless"

    @property
    def two_stages(self) -> bool:
        """True if tokens travel inside nodes first and then between them."""
        return self.travel[1] is not None

    def parallel(self) -> ParallelConfig:
        """How its ranks share the work; `ConfigError` if that does not come down to the cell's choices."""
        _, ep_size, _ = self.spread
        who, shape, chunks = self.travel
        group = WEIGHT_GROUP.get(who, ep_size)
        found = "nothing" if ep_size == 1 else "tokens" if group == 1 else "weights" if group == ep_size else who
        if found != who or (shape is not None and shape[0] * shape[1] * group != ep_size):
            raise ConfigError(f"{self.travel} is not what travels among {ep_size} ranks")
        return _parallel(ep_size, group, None if shape is None else shape[1] * group, chunks)

    def columns(self) -> list[str]:
        """Its choices in words, in the order of `HEADINGS`."""
        world, ep, experts = self.spread
        who, shape, chunks = self.travel
        sliced = f" in {ep // experts} slices" if ep > experts else ""
        how = "flat" if shape is None else f"2DH {shape[0]}x{shape[1]}"
        how = "-" if who in ("nothing", "weights") else how + (f", {chunks} chunks" if chunks > 1 else "")
        choices = [self.layout, how, self.capacity, self.training, str(self.top_k), self.balance]
        return [f"{world // ep} x {ep}", f"{experts}{sliced}", who, *choices]

    def __str__(self) -> str:
        return " | ".join(self.columns())


HEADINGS = ["data x expert", "experts", "travel", "layout", "exchange", "capacity", "training", "k", "balance"]

COMMON: dict[str, Sequence[Choice]] = {
    "layout": ["ragged", "padded"],
    "capacity": ["dropless", "fixed", "prioritised"],
    "training": ["clip", "accumulation", "checkpointing"],
    "top_k": [1, 2],
    "balance": ["global", "local"],
}
AXES: dict[str, Sequence[Choice]] = {
    "spread": [
        (1, 1, 4),
        (2, 1, 4), (2, 2, 4), (2, 2, 1),
        (4, 1, 4), (4, 2, 4), (4, 2, 1), (4, 4, 4), (4, 4, 8), (4, 4, 2), (4, 4, 1),
    ],
    "travel": [
        ("nothing", None, 1),
        *(("tokens", shape, chunks) for shape in (None, (2, 2)) for chunks in (1, 2)),
        ("both by 2", None, 1), ("both by 2", None, 2),
        ("weights", None, 1),
    ],
    **COMMON,
}  # fmt: skip
"""One, two and four processes."""
SIX: dict[str, Sequence[Choice]] = {
    "spread": [(6, 6, 6), (6, 6, 3), (6, 6, 2)],
    "travel": [
        *(("tokens", shape, chunks) for shape in ((2, 3), (3, 2)) for chunks in (1, 2)),
        ("both by 2", None, 1), ("both by 3", None, 2),
    ],
    **COMMON,
}  # fmt: skip
"""Six processes, for nodes of 2 x 3 and 3 x 2 ranks, where swapped axes show."""


@cache
def _model(experts: int, layout: str, capacity: str, checkpointing: bool, top_k: int, balance: str) -> ModelConfig:
    """Two windows of four tokens, one block, as small as a Swin-MoE gets."""
    policy = CapacityPolicy() if capacity == "dropless" else CapacityPolicy(kind="fixed", factor=0.5)
    moe = MoEConfig(
        num_experts=experts,
        top_k=top_k,
        dispatcher=layout,
        router=RouterConfig(noise=1.0, batch_prioritized=capacity == "prioritised"),
        capacity=CapacityConfig(train=policy),
        losses=BalanceLossConfig(gshard=0.1, importance_load=0.1, z=0.01, batch=balance),  # type: ignore[arg-type]
    )
    return ModelConfig(
        img_size=(4, 4),
        patch_size=(2, 2),
        window_size=(2, 2),
        in_chans=1,
        num_classes=4,
        embed_dim=12,
        depths=(1,),
        num_heads=(2,),
        mlp_ratio=1.0,  # 12 hidden units: slices of 6, 4, 3 and 2
        drop_path_rate=0.0,
        grad_checkpointing=checkpointing,
        moe=moe,
        moe_blocks=((0,),),
    )


@cache
def _parallel(ep_size: int, group: int, local_size: int | None, chunks: int) -> ParallelConfig:
    exchange: Any = "flat" if local_size is None else "2dh"
    return ParallelConfig(ep_size=ep_size, weight_group=group, exchange=exchange, local_size=local_size, chunks=chunks)


_OPTIM = OptimConfig(clip_grad_norm=0.01)


@cache
def _train(accumulation: int) -> TrainConfig:
    return TrainConfig(batch_size=4 * accumulation, accumulation=accumulation)


def run_of(cell: Cell) -> RunConfig:
    """The config of a cell; `ConfigError` if it has no meaning."""
    _, _, experts = cell.spread
    recompute = cell.training == "checkpointing"
    return RunConfig(
        model=_model(experts, cell.layout, cell.capacity, recompute, cell.top_k, cell.balance),
        parallel=cell.parallel(),
        optim=_OPTIM,
        train=_train(2 if cell.training == "accumulation" else 1),
    )


def has_meaning(cell: Cell) -> bool:
    try:
        run_of(cell)
    except ConfigError:
        return False
    return True


def pairwise(axes: dict[str, Sequence[Choice]], together: Sequence[str] = ()) -> tuple[list[Cell], int]:
    """A greedy pairwise cover of all cells that have a meaning, and how many of those there are; deterministic.

    Every combination of the axes named in `together` is met too.
    """
    # Axes in the order in which they are refused: most candidates fall before the rest is even tried.
    candidates = [cell for choice in product(*axes.values()) if has_meaning(cell := Cell(**dict(zip(axes, choice))))]  # noqa: B905
    numbers: dict[tuple[Choice, ...], int] = {}
    pairs = np.array(
        [[numbers.setdefault(met, len(numbers)) for met in _met(cell, axes, together)] for cell in candidates]
    )
    times = np.zeros(len(numbers), dtype=np.int64)  # that each pair has been in a cell
    cover = []
    while (new := times == 0).any():
        # Most new pairs; among equals the pairs met least often, so that the last cells are not all alike.
        best = int((new[pairs].sum(1) - times[pairs].sum(1) / 1e6).argmax())
        times[pairs[best]] += 1
        cover.append(candidates[best])
    return cover, len(candidates)


def _met(cell: Cell, axes: Iterable[str], together: Sequence[str]) -> list[tuple[Choice, ...]]:
    """What a cell lets meet: its choices two by two, and those of the axes in `together`."""
    pairs = [(a, b, getattr(cell, a), getattr(cell, b)) for a, b in combinations(axes, 2)]
    return [*pairs, tuple(getattr(cell, axis) for axis in together)] if together else pairs


def table(results: Sequence[tuple[Cell, ParallelProof, ParallelProof]]) -> str:
    """Markdown: a row per cell with what float64 proves and float32 has."""
    headings = [
        *HEADINGS, "loss", "gradients", "parameters", "float32 gradients", "dropped", "clip factors", "bit-equal",
    ]  # fmt: skip
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for cell, proof, single in results:
        numbers = [proof.loss_difference, proof.worst_gradient[1], proof.worst_parameter[1], single.worst_gradient[1]]
        figures = [f"{number:.0e}" for number in numbers]
        clipped = f"{proof.clip_factor:.2g} to {proof.largest_clip_factor:.2g}"
        ends = [f"{proof.dropped}/{proof.routed}", clipped, "yes" if proof.bit_equal else "**no**"]
        lines.append("| " + " | ".join([*cell.columns(), *figures, *ends]) + " |")
    return "\n".join(lines)
