"""A gather over ranks, for what needs no gradient: counts, checkpoints."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from swinmoe.comm.all_to_all import Group
from swinmoe.comm.failure import naming
from swinmoe.comm.neighbours import gather_small
from swinmoe.comm.traffic import note

# torch 2.14 renames it and warns of the old name, which is the only one before.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@torch.no_grad()
def all_gather_rows(x: Tensor, group: Group, what: str = "gathering rows") -> Tensor:
    """`x` (n, ...) of all ranks one after another, (G·n, ...) for G ranks; equal shapes everywhere; None = `x`.

    Raises:
        CollectiveError: it failed or timed out; names `what`.
    """
    if group is None:
        return x
    with naming(what):
        small = gather_small(x, group)
    if small is not None:
        _note_gather(x, group, what)
        return small.flatten(0, 1)
    gathered = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    gather_into(gathered, x.detach().contiguous(), group, what)
    return gathered


def gather_into(gathered: Tensor, x: Tensor, group: dist.ProcessGroup, what: str, *, waits: bool = True) -> Any:
    """All ranks' `x` one after another in `gathered`; what to wait for, unless `waits`."""
    _note_gather(x, group, what)
    with naming(what):
        return _gather(gathered, x, group=group, async_op=not waits)


def _note_gather(x: Tensor, group: dist.ProcessGroup, what: str) -> None:
    note("all_gather", what, group.size(), (group.size() - 1) * x.nbytes)
