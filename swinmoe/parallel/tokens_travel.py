"""Tokens travel to the ranks that hold their experts, and back.

Shapes: N rows here, D width, E experts (global), G ranks of the group. E ≥ G: e = E/G experts on each rank. E < G: each
expert is cut into r = G/E slices of its hidden width, rank g·r + i holds slice i of expert g, and e = 1. S slots per
expert and source (padded layout). n (G, E) is the count matrix: rows that each rank sends to each expert.

Ranks hold contiguous experts, so rows sorted by global expert are sorted by destination too: unless rows are copied
for slices, cut into chunks or sent in two stages, they leave as they are. What arrives is put in the order (local
expert, source), so that each expert has its rows in one piece. The padded layout is the ragged one with every count
equal to S, known in advance.

Chunks: with C > 1, rows travel in C parts, and the experts work on one while the next is on its way. A part is a run of
the local experts where there are at least C of them (each weight is used once), otherwise a share of every expert's
rows. The backward pass runs the same line in reverse: while one part's gradients travel, another's are computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from swinmoe.comm import (
    Journey,
    Regrouping,
    all_gather_rows,
    all_reduce_max,
    all_reduce_sum,
    departure_order,
    direct,
    fold,
    regroup,
    take,
    two_stages,
)
from swinmoe.comm.all_to_all import Group
from swinmoe.moe import phases
from swinmoe.moe.precision import autocast_dtype
from swinmoe.moe.types import ExpertFn, ExpertRows, ExpertWeights, Route
from swinmoe.parallel.mesh import TokenGroup


@dataclass(frozen=True)
class Chunk:
    """Rows that travel together."""

    journey: Journey
    way_back: Journey
    rows: int
    """Rows that leave here."""
    segments: Tensor
    """(1, e') int64 on the host: rows that arrive here for each local expert of the chunk."""


@dataclass(frozen=True)
class Itinerary:
    """Everything about one exchange that follows from the count matrix."""

    departure: Regrouping | None
    """Rows sorted by expert -> rows in the order in which they leave, chunk after chunk."""
    chunks: tuple[Chunk, ...]
    by_expert: bool
    """Each chunk has local experts of its own; else each has a share of every expert's rows."""


class TokensTravel:
    """Rows go to the rank that holds their expert, and back.

    A forward pass costs one message of counts with one host copy, and per chunk two all-to-alls (2DH: four); a backward
    pass the same without the counts. Any rank may have any number of rows, zero too; all ranks of the group must take
    part in each pass.

    Args:
        group: where tokens travel.
        slices: r.
        chunks: C.
        payload: `bf16` rounds what travels, rows and gradients; `full` leaves them as they are.
        batch: the ranks whose statistics are summed.
        layer: the layer's name in errors.
    """

    def __init__(
        self, group: TokenGroup, *, slices: int, chunks: int, payload: str, batch: Group, layer: str = "expert layer"
    ) -> None:
        self.group, self.slices, self.chunks, self.payload = group, slices, chunks, payload
        self.batch, self.layer = batch, layer
        self._padded: dict[tuple[int, int, torch.device], Itinerary] = {}

    def prepare(self, counts: Tensor, slots: int | None) -> Route:
        """Tell the group how many rows go to each expert, (E,) here; padded layout: agree on the number of slots.

        Slots differ between ranks when token counts do. Each rank drops by its own capacity; only the size of the
        buffers is the largest of the group's.

        The host waits for its device once where rows are ragged, for the counts of all ranks; in the padded layout not
        at all, but for the other hosts. That cannot be spared where capacity is fixed either: slots then follow from
        the number of tokens, but no rank can tell alone that all have as many as it has.
        """
        pg = self.group.group
        if slots is not None:
            own = torch.tensor(slots)  # the host knows it: the device need not wait
            agreed = int(all_reduce_max(own, pg, f"{self.layer}: agreeing on slots"))
            return Route(matrix=None, slots=agreed, plan=self._padded_itinerary(agreed, len(counts), counts.device))
        matrix = all_gather_rows(counts, pg, f"{self.layer}: gathering counts").cpu().view(self.group.size, len(counts))
        rows = int(matrix[self.group.rank].sum())
        return Route(matrix=matrix, slots=None, rows=rows, plan=self._itinerary(matrix, counts.device))

    def run(self, x: ExpertRows, route: Route, w: ExpertWeights, fn: ExpertFn) -> Tensor:
        """Expert outputs in the order and shape of `x.rows`: ragged (N, D) or padded (E, S, D)."""
        if route.slots is None:
            return self._carry(x.rows, route.plan, w, fn, padded=False)
        experts, own_slots, dim = x.rows.shape
        # This rank's own capacity may be below the agreed one.
        rows = x.rows if own_slots == route.slots else F.pad(x.rows, (0, 0, 0, route.slots - own_slots))
        out = self._carry(rows.reshape(experts * route.slots, dim), route.plan, w, fn, padded=True)
        return out.view(experts, route.slots, dim)[:, :own_slots]

    def reduce(self, stats: Tensor) -> Tensor:
        """Sum over all ranks (the batch is spread over replicas too), with the identity as its backward."""
        return all_reduce_sum(stats, self.batch, f"{self.layer}: summing statistics")

    def __deepcopy__(self, memo: dict[int, object]) -> TokensTravel:
        return self

    def _carry(self, rows: Tensor, plan: Itinerary, w: ExpertWeights, fn: ExpertFn, padded: bool) -> Tensor:
        """The line of chunks. All sends are posted first; then each chunk's experts run while later ones travel."""
        going, coming = f"{self.layer}: sending tokens to experts", f"{self.layer}: returning tokens from experts"
        # Experts cast what they are given under autocast; cast before it travels, it is half the bytes.
        dtype = autocast_dtype(rows) or rows.dtype
        light = torch.bfloat16 if self.payload == "bf16" else None
        ways = [chunk.journey for chunk in plan.chunks]
        whole = take(rows.to(light or dtype), plan.departure)
        # A single part is no part: the backward pass of `split` would copy it.
        parts = [whole] if len(ways) == 1 else whole.split([chunk.rows for chunk in plan.chunks])
        out = [way.depart(part, going) for way, part in zip(ways, parts, strict=True)]
        out[0] = ways[0].change(out[0], going)
        back = []
        for i, (chunk, weights) in enumerate(zip(plan.chunks, self._weights_of(plan, w), strict=True)):
            phases.enter("exchange_out")
            if i + 1 < len(out):
                out[i + 1] = ways[i + 1].change(out[i + 1], going)
            arrived = ways[i].arrive(out[i]).to(dtype)
            done = _padded(arrived, chunk, weights, fn) if padded else fn(arrived, chunk.segments, weights)
            dtype = done.dtype
            flight = chunk.way_back.depart(done.to(light or dtype), coming)
            # Backward, this chunk's gradients are waited for after another chunk's have left on their way out.
            back.append(replace(flight, token=phases.border(flight.token, "exchange_back", "exchange_back")))
        back = [chunk.way_back.change(flight, coming) for chunk, flight in zip(plan.chunks, back, strict=True)]
        returned = [chunk.way_back.arrive(flight) for chunk, flight in zip(plan.chunks, back, strict=True)]
        total = returned[0] if len(returned) == 1 else torch.cat(returned)
        if self.slices > 1:
            total = total.to(torch.promote_types(dtype, torch.float32))  # partial outputs are summed
        return fold(total, plan.departure).to(dtype)

    def _weights_of(self, plan: Itinerary, w: ExpertWeights) -> list[ExpertWeights]:
        """The weights that each chunk uses."""
        if self.slices > 1 and w.b2 is not None:
            # Every slice's output counts in the sum, so each adds its own part of the bias and nothing elsewhere.
            width, dim = w.b2.shape[1], w.fc2.shape[1]
            first = self.group.rank % self.slices * width
            w = ExpertWeights(w.fc1, w.b1, w.fc2, F.pad(w.b2, (first, dim - first - width)))
        if not plan.by_expert or len(plan.chunks) == 1:
            return [w] * len(plan.chunks)
        sizes = [chunk.segments.shape[1] for chunk in plan.chunks]
        parts = [[None] * len(sizes) if t is None else t.split(sizes) for t in (w.fc1, w.b1, w.fc2, w.b2)]
        return [ExpertWeights(*part) for part in zip(*parts, strict=True)]

    def _padded_itinerary(self, slots: int, num_experts: int, device: torch.device) -> Itinerary:
        key = (slots, num_experts, device)
        if key not in self._padded:
            if len(self._padded) >= 8:  # dropless padding has as many sizes as steps
                self._padded.clear()
            matrix = torch.full((self.group.size, num_experts), slots)
            self._padded[key] = self._itinerary(matrix, device)
        return self._padded[key]

    def _itinerary(self, matrix: Tensor, device: torch.device) -> Itinerary:
        group, size, me = self.group, self.group.size, self.group.rank
        num_experts = matrix.shape[1]
        local = max(1, num_experts // size)
        owners = num_experts // local  # ranks, or groups of slices, that experts differ between
        assert owners * self.slices == size, f"{num_experts} experts in {self.slices} slices on {size} ranks"
        by_owner = matrix.view(size, owners, local)
        by_expert = local >= self.chunks
        shares, chunks = [], []
        for number in range(self.chunks):
            first, last = 0, local
            share = by_owner * (number + 1) // self.chunks - by_owner * number // self.chunks
            if by_expert:
                first, last = local * number // self.chunks, local * (number + 1) // self.chunks
                share = torch.zeros_like(by_owner)
                share[:, :, first:last] = by_owner[:, :, first:last]
            shares.append(share[me])
            sent = share.sum(2).repeat_interleave(self.slices, dim=1)  # (source, destination)
            segments = share[:, me // self.slices, first:last].contiguous()
            journey = self._journey(sent, segments, device)
            chunks.append(Chunk(journey, journey.back(), int(sent[me].sum()), segments.sum(0, keepdim=True)))
        # Blocks of rows, in the order in which they lie here: by expert, and by chunk within an expert.
        lengths = torch.stack(shares, dim=-1).view(-1)
        blocks = torch.arange(lengths.numel()).view(owners, local, self.chunks)
        to = departure_order(size, group.local_size) // self.slices  # owner of each destination, in leaving order
        order = blocks[to].permute(2, 0, 1).reshape(-1)
        return Itinerary(regroup(lengths, order, device), tuple(chunks), by_expert)

    def _journey(self, sent: Tensor, segments: Tensor, device: torch.device) -> Journey:
        group = self.group
        if group.local_size is None:
            return direct(sent, group.rank, group.group, segments)
        return two_stages(sent, group.rank, group.local_size, group.inner, group.outer, device, segments)


def _padded(arrived: Tensor, chunk: Chunk, w: ExpertWeights, fn: ExpertFn) -> Tensor:
    """Rows (e·G·S, D) ordered (expert, source, slot) through `fn` as (e, G·S, D): an expert sees one block."""
    block = arrived.view(chunk.segments.shape[1], int(chunk.segments[0, 0]), arrived.shape[1])
    return fn(block, None, w).view(arrived.shape)
