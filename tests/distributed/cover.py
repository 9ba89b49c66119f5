"""A pairwise cover of the ways to spread an expert layer: few cells in which every two choices meet.

A cell is one choice per axis. Whether it has a meaning is for the config to say: what `RunConfig` refuses is no cell.
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


@dataclass(frozen=True)
class Cell:
    """One choice per axis."""

    spread: tuple[int, int, int]
    """(processes, ep_size, num_experts)"""
    travel: tuple[int, str, int | None, int]
    """(weight_group, exchange, local_size, chunks): one axis, since they mean little without each other"""
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

    def columns(self) -> list[str]:
        """Its choices in words, in the order of `HEADINGS`."""
        world, ep, experts = self.spread
        group, _, local, chunks = self.travel
        sliced = f" in {ep // experts} slices" if ep > experts else ""
        who = "-" if ep == 1 else {1: "tokens", ep: "weights"}.get(group, f"both, by {group}")
        how = "flat" if local is None else f"2DH {ep // local}x{local // group}"
        how = "-" if ep == group else how + (f", {chunks} chunks" if chunks > 1 else "")
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
        (group, *exchange)
        for group in (1, 2, 4)
        for exchange in (
            ("flat", None, 1), ("flat", None, 2), ("2dh", 1, 1), ("2dh", 2, 1), ("2dh", 2, 2),
        )
    ],
    **COMMON,
}  # fmt: skip
"""One, two and four processes."""
SIX: dict[str, Sequence[Choice]] = {
    "spread": [(6, 6, 6), (6, 6, 3), (6, 6, 2)],
    "travel": [(group, "2dh", local, chunks) for group in (1, 2, 3) for local in (2, 3) for chunks in (1, 2)],
    **COMMON,
}
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
def _parallel(ep_size: int, group: int, exchange: Any, local_size: int | None, chunks: int) -> ParallelConfig:
    return ParallelConfig(ep_size=ep_size, weight_group=group, exchange=exchange, local_size=local_size, chunks=chunks)


_OPTIM = OptimConfig(clip_grad_norm=0.01)


@cache
def _train(accumulation: int) -> TrainConfig:
    return TrainConfig(batch_size=4 * accumulation, accumulation=accumulation)


def run_of(cell: Cell) -> RunConfig:
    """The config of a cell; `ConfigError` if it has no meaning."""
    _, ep_size, experts = cell.spread
    recompute = cell.training == "checkpointing"
    return RunConfig(
        model=_model(experts, cell.layout, cell.capacity, recompute, cell.top_k, cell.balance),
        parallel=_parallel(ep_size, *cell.travel),
        optim=_OPTIM,
        train=_train(2 if cell.training == "accumulation" else 1),
    )


def has_meaning(cell: Cell) -> bool:
    try:
        run_of(cell)
    except ConfigError:
        return False
    return True


def pairwise(axes: dict[str, Sequence[Choice]]) -> tuple[list[Cell], int]:
    """A greedy pairwise cover of all cells that have a meaning, and how many of those there are; deterministic."""
    # Axes in the order in which they are refused: most candidates fall before the rest is even tried.
    candidates = [cell for choice in product(*axes.values()) if has_meaning(cell := Cell(**dict(zip(axes, choice))))]  # noqa: B905
    numbers: dict[tuple[int, int, Choice, Choice], int] = {}
    pairs = np.array([[numbers.setdefault(pair, len(numbers)) for pair in _pairs(cell, axes)] for cell in candidates])
    times = np.zeros(len(numbers), dtype=np.int64)  # that each pair has been in a cell
    cover = []
    while (new := times == 0).any():
        # Most new pairs; among equals the pairs met least often, so that the last cells are not all alike.
        best = int((new[pairs].sum(1) - times[pairs].sum(1) / 1e6).argmax())
        times[pairs[best]] += 1
        cover.append(candidates[best])
    return cover, len(candidates)


def _pairs(cell: Cell, axes: Iterable[str]) -> list[tuple[int, int, Choice, Choice]]:
    choices = [getattr(cell, axis) for axis in axes]
    return [(i, j, choices[i], choices[j]) for i, j in combinations(range(len(choices)), 2)]


def table(results: Sequence[tuple[Cell, ParallelProof, ParallelProof]]) -> str:
    """Markdown: a row per cell with what float64 proves and float32 has."""
    headings = [
        *HEADINGS, "loss", "gradients", "parameters", "float32 gradients", "dropped", "clip factor", "bit-equal",
    ]  # fmt: skip
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for cell, proof, single in results:
        numbers = [proof.loss_difference, proof.worst_gradient[1], proof.worst_parameter[1], single.worst_gradient[1]]
        figures = [f"{number:.0e}" for number in numbers]
        ends = [f"{proof.dropped}/{proof.routed}", f"{proof.clip_factor:.2g}", "yes" if proof.bit_equal else "**no**"]
        lines.append("| " + " | ".join([*cell.columns(), *figures, *ends]) + " |")
    return "\n".join(lines)
