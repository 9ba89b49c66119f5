"""A sum over ranks for statistics that enter a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from swinmoe.comm.all_to_all import Group
from swinmoe.comm.failure import naming
from swinmoe.comm.neighbours import gather_small
from swinmoe.comm.traffic import note_all_reduce


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
        note_all_reduce(x, group, what)
        with naming(what):
            everyone = gather_small(x, group)
            if everyone is not None:
                return everyone.sum(0, dtype=x.dtype)  # in the same order, and so the same, on all ranks
            total = x.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def all_reduce_sum(x: Tensor, group: Group, what: str = "summing statistics") -> Tensor:
    """The sum of `x` (any shape and dtype, equal on all ranks) over `group`, differentiable; None = `x` itself.

    The backward is the identity. Every rank computes the same loss L(S) from S = Σ_r s_r and holds the gradient
    L'(S)·ds_r of its own share; gradients are *summed* over ranks later, which makes L'(S)·Σ_r ds_r. (The transpose of
    the sum, another sum, would count the loss once per rank.)

    Raises:
        CollectiveError: it failed or timed out; names `what`.
    """
    return x if group is None else _SumOverRanks.apply(x, group, what)


@torch.no_grad()
def all_reduce_max(x: Tensor, group: Group, what: str = "taking a maximum") -> Tensor:
    """The largest of each element of `x` over `group`, a new tensor; None = `x` itself."""
    return _extreme(x, group, what, torch.amax, dist.ReduceOp.MAX)


@torch.no_grad()
def all_reduce_min(x: Tensor, group: Group, what: str = "taking a minimum") -> Tensor:
    """The smallest of each element of `x` over `group`, a new tensor; None = `x` itself."""
    return _extreme(x, group, what, torch.amin, dist.ReduceOp.MIN)


def _extreme(x: Tensor, group: Group, what: str, of_ranks: Callable[..., Tensor], operation: Any) -> Tensor:
    if group is None:
        return x
    note_all_reduce(x, group, what)
    with naming(what):
        everyone = gather_small(x, group)
        if everyone is not None:
            return of_ranks(everyone, 0)
        found = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found, operation, group=group)
    return found
