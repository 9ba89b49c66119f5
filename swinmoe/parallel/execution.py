"""How expert layers run when there is more than one process.

Shapes: N rows here, D width, E experts (global), G ranks of the expert group, e = E/G experts here, S slots per expert
and source rank (padded layout), n (G, E) the count matrix: rows that each rank sends to each expert.

Ranks of an expert group hold contiguous slices of the experts, so rows sorted by global expert are sorted by
destination too: the exchange needs no permutation, and what arrives is ordered (source, local expert), as `ExpertFn`
wants it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from swinmoe.comm import all_gather_rows, all_reduce_sum, all_to_all_rows
from swinmoe.moe.execution import LocalExecution
from swinmoe.moe.types import ExpertFn, ExpertRows, ExpertWeights, Route
from swinmoe.parallel.mesh import Mesh


class ReplicatedExecution:
    """Every rank holds all experts and keeps its rows; only statistics are summed, over all ranks."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._local = LocalExecution()

    def prepare(self, counts: Tensor, slots: int | None) -> Route:
        """As on one process; no traffic."""
        return self._local.prepare(counts, slots)

    def run(self, x: ExpertRows, route: Route, w: ExpertWeights, fn: ExpertFn) -> Tensor:
        """As on one process; no traffic."""
        return self._local.run(x, route, w, fn)

    def reduce(self, stats: Tensor) -> Tensor:
        """Sum over all ranks, with the identity as its backward."""
        return all_reduce_sum(stats, self.mesh.world_group)


class ExpertParallelExecution:
    """Rows travel to the rank that holds their expert, and back.

    A forward pass costs one gather of counts with one host copy and two all-to-alls; a backward pass two all-to-alls.
    Any rank may have any number of rows, zero too; all ranks of the group must take part in each pass.
    """

    def __init__(self, mesh: Mesh, layer: str = "expert layer") -> None:
        assert mesh.ep_group is not None, "an expert group of one needs no exchange"
        self.mesh = mesh
        self.layer = layer

    def prepare(self, counts: Tensor, slots: int | None) -> Route:
        """Tell the group how many rows go to each expert, (E,) here; padded layout: agree on the number of slots.

        Slots differ between ranks when token counts do. Each rank drops by its own capacity; only the size of the
        buffers is the largest of the group's.
        """
        group = self.mesh.ep_group
        if slots is not None:
            agreed = torch.tensor(slots, device=counts.device)
            dist.all_reduce(agreed, dist.ReduceOp.MAX, group=group)
            return Route(matrix=None, slots=int(agreed))
        matrix = all_gather_rows(counts, group).cpu().view(self.mesh.ep_size, counts.numel())
        return Route(matrix=matrix, slots=None, rows=int(matrix[self.mesh.ep_rank].sum()))

    def run(self, x: ExpertRows, route: Route, w: ExpertWeights, fn: ExpertFn) -> Tensor:
        """Expert outputs in the order and shape of `x.rows`: ragged (N, D) or padded (E, S, D)."""
        if route.matrix is None:
            return self._run_padded(x.rows, route, w, fn)
        return self._run_ragged(x.rows, route.matrix, w, fn)

    def reduce(self, stats: Tensor) -> Tensor:
        """Sum over all ranks (the batch is spread over replicas too), with the identity as its backward."""
        return all_reduce_sum(stats, self.mesh.world_group)

    def _run_ragged(self, rows: Tensor, matrix: Tensor, w: ExpertWeights, fn: ExpertFn) -> Tensor:
        size, me, group = self.mesh.ep_size, self.mesh.ep_rank, self.mesh.ep_group
        by_owner = matrix.view(size, size, -1)  # (source, destination, local expert)
        sends = by_owner[me].sum(dim=-1).tolist()
        receives = by_owner[:, me].sum(dim=-1).tolist()
        arrived = all_to_all_rows(rows, sends, receives, group, f"{self.layer}: sending tokens to experts")
        done = fn(arrived, by_owner[:, me].contiguous(), w)
        return all_to_all_rows(done, receives, sends, group, f"{self.layer}: returning tokens from experts")

    def _run_padded(self, rows: Tensor, route: Route, w: ExpertWeights, fn: ExpertFn) -> Tensor:
        size, group = self.mesh.ep_size, self.mesh.ep_group
        experts, own_slots, dim = rows.shape
        local = experts // size
        assert route.slots is not None
        slots = route.slots
        if own_slots < slots:  # this rank's own capacity is below the agreed one
            rows = F.pad(rows, (0, 0, 0, slots - own_slots))
        even = [local * slots] * size
        arrived = all_to_all_rows(
            rows.reshape(experts * slots, dim), even, even, group, f"{self.layer}: sending tokens to experts"
        )
        # (G, e, S, D) -> (e, G·S, D): an expert sees the rows of all sources as one block.
        block = arrived.view(size, local, slots, dim).transpose(0, 1).reshape(local, size * slots, dim)
        done = fn(block, None, w)
        outgoing = done.view(local, size, slots, dim).transpose(0, 1).reshape(experts * slots, dim)
        returned = all_to_all_rows(outgoing, even, even, group, f"{self.layer}: returning tokens from experts")
        return returned.view(experts, slots, dim)[:, :own_slots]
