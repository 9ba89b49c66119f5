"""A gather of several tensors whose backward sums: for weights that travel to the tokens.

Shapes: G ranks; every tensor has the same shape on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from swinmoe.comm.all_to_all import Group
from swinmoe.comm.failure import naming
from swinmoe.comm.gather import all_gather_rows
from swinmoe.comm.traffic import note

# torch 2.14 renames it and warns of the old name, which is the only one before.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _GatherPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, what: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.what, ctx.shapes = group, what, [t.shape for t in tensors]
        sizes = [t.numel() for t in tensors]
        packed = torch.cat([t.reshape(-1) for t in tensors]).unsqueeze(0)
        by_rank = all_gather_rows(packed, group, what)
        parts = by_rank.split(sizes, dim=1)  # views, whose leading stride is that of the whole package
        gathered = tuple(part.reshape(-1, *shape) for part, shape in zip(parts, ctx.shapes, strict=True))
        # Else experts would compute gradients of frozen weights too.
        ctx.mark_non_differentiable(
            *(whole for whole, needed in zip(gathered, ctx.needs_input_grad[2:], strict=True) if not needed)
        )
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        size = ctx.group.size()
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        packed = torch.cat([grads[i].reshape(size, -1) for i in wanted], dim=1)
        total = packed.new_empty(packed.shape[1])
        sum_onto_owners(total, packed.view(-1), ctx.group, ctx.what, doing=f"{ctx.what}: summing their gradients")
        shares: list[Tensor | None] = [None] * len(grads)
        for i, share in zip(wanted, total.split([ctx.shapes[i].numel() for i in wanted]), strict=True):
            shares[i] = share.view(ctx.shapes[i])
        return (None, None, *shares)


def all_gather_sum(tensors: Sequence[Tensor], group: Group, what: str = "gathering weights") -> list[Tensor]:
    """Every tensor of every rank, (G, ...) each, in one message; None = this process alone, G = 1.

    The backward sums each rank's gradients of a share at its owner, in one message too. All ranks must ask for the
    gradients of the same tensors. Tensors of one call have one dtype.
    """
    if group is None:
        return [t.unsqueeze(0) for t in tensors]
    assert len({t.dtype for t in tensors}) == 1, f"tensors of several dtypes: {[t.dtype for t in tensors]}"
    return list(_GatherPacked.apply(group, what, *tensors))


def sum_onto_owners(
    share: Tensor, whole: Tensor, group: dist.ProcessGroup, what: str, *, doing: str | None = None, waits: bool = True
) -> Any:
    """This rank's part, (n,), of the sum of all ranks' `whole`, (G·n,), in `share`; what to wait for, unless `waits`.

    Args:
        doing: what an error says; None = `what`.
    """
    note("reduce_scatter", what, group.size(), (group.size() - 1) * share.nbytes)
    with naming(doing or what):
        return _reduce_scatter(share, whole, group=group, async_op=not waits)
