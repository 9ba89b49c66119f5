"""Putting blocks of rows in another order, with copies if asked, and bringing them back.

Shapes: N rows in B blocks, R copies of each, M = R·N rows afterwards, D width.

Both directions gather: `take` reads each row's source, `fold` adds up each row's copies. They are each other's
transposes, so either one's gradient is the other along the same indices; autograd would scatter instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Regrouping:
    """Indices of one change of order."""

    source: Tensor
    """(M,) int64 which row stands at each place afterwards."""
    places: Tensor
    """(R, N) int64 where each row's copies went."""

    def inverse(self) -> Regrouping:
        """The way back of a change without copies."""
        assert len(self.places) == 1, "rows that were copied have several ways back: fold them"
        return Regrouping(self.places[0], self.source.unsqueeze(0))


def regroup(lengths: Tensor, order: Tensor, device: torch.device | str = "cpu") -> Regrouping | None:
    """Indices that put blocks in another order; None where that is the order they have, whatever their lengths.

    Small tensors are prepared on the host and sent; what has a row's length is made on `device`, without a sync.

    Args:
        lengths: (B,) int64 on the host, rows of each block.
        order: (R·B,) int64 on the host, blocks as they shall stand; each occurs R times.
        device: where the rows are.
    """
    copies, left = divmod(len(order), max(1, len(lengths)))
    assert left == 0, f"{len(order)} places for {len(lengths)} blocks"
    if copies == 1 and torch.equal(order, torch.arange(len(order))):
        return None
    first = lengths.cumsum(0) - lengths
    new_lengths = lengths[order]
    new_first = new_lengths.cumsum(0) - new_lengths
    where = order.argsort(stable=True).view(len(lengths), copies)  # places of each block's copies
    source = _ramps(first[order] - new_first, new_lengths, device)
    places = [_ramps(new_first[where[:, copy]] - first, lengths, device) for copy in range(copies)]
    return Regrouping(source, torch.stack(places))


def _ramps(shifts: Tensor, lengths: Tensor, device: torch.device | str) -> Tensor:
    """(Σ lengths,) 0, 1, 2, ..., each block shifted by its own number."""
    total = int(lengths.sum())
    shifts, lengths = shifts.to(device, non_blocking=True), lengths.to(device, non_blocking=True)
    return shifts.repeat_interleave(lengths, output_size=total).add_(torch.arange(total, device=device))


def take(rows: Tensor, change: Regrouping | None) -> Tensor:
    """(N, D) -> (M, D) in the new order; None = as they are."""
    return rows if change is None else _Take.apply(rows, change)


def fold(rows: Tensor, change: Regrouping | None) -> Tensor:
    """(M, D) -> (N, D): back to the old order, copies of a row added up; None = as they are."""
    return rows if change is None else _Fold.apply(rows, change)


def _sum_copies(rows: Tensor, places: Tensor) -> Tensor:
    total = rows.index_select(0, places[0])
    for copy in places[1:]:
        total += rows.index_select(0, copy)
    return total


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, change: Regrouping) -> Tensor:
        ctx.change = change
        return rows.index_select(0, change.source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_copies(grad, ctx.change.places), None


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, change: Regrouping) -> Tensor:
        ctx.change = change
        return _sum_copies(rows, change.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.change.source), None
