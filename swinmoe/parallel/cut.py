"""Tensors that FSDP2 has cut along their first axis, one band of rows for each rank: what this rank has, and the whole.

Shapes: a whole (n, ...) over W ranks; rank r holds the rows [r·s, min((r+1)·s, n)), s = ⌈n/W⌉, which may be none.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from swinmoe.comm import all_gather_rows
from swinmoe.parallel.mesh import Mesh

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Cut:
    """Which rows of a whole are here."""

    rows: int
    """n, of the whole."""
    share: int
    """s, of most ranks; the last ones have fewer, or none."""
    first: int
    """Of those here."""


def is_cut(tensor: Tensor) -> TypeGuard[DTensor]:
    """True for a parameter (a gradient, a moment) of which this rank has some rows only."""
    # Nobody has made one before the module is there, and it takes long to import.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """The rows that this rank has, sharing memory; `tensor` itself if it is not cut. Without a gradient."""
    if not is_cut(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part


def cut_of(tensor: Tensor) -> Cut | None:
    """How `tensor` is cut; None if it is not."""
    if not is_cut(tensor):
        return None
    assert [p.is_shard(0) for p in tensor.placements] == [True], tensor.placements
    rows, ranks = tensor.shape[0], tensor.device_mesh.size()
    share = -(-rows // ranks)
    return Cut(rows, share, min(rows, tensor.device_mesh.get_local_rank() * share))


@torch.no_grad()
def join_rows(part: Tensor, cut: Cut, mesh: Mesh, what: str = "gathering the rows of a tensor") -> Tensor:
    """The whole (n, ...) of every rank's rows, on every rank. A collective call."""
    missing = cut.share - part.shape[0]
    padded = F.pad(part, (0, 0) * (part.dim() - 1) + (0, missing)) if missing else part
    return all_gather_rows(padded.detach().unsqueeze(0).contiguous(), mesh.world_group, what).flatten(0, 1)[: cut.rows]
