"""Ways for rows to reach the ranks they are meant for: in one all-to-all, or in two stages by way of the node.

Shapes: G ranks of the group in nodes of L neighbours, rank = node·L + local; N rows here, D width;
M (G, G) int64 on the host, M[s, d] rows that rank s sends to rank d.

2DH (Hwang et al. 2023, §3.4; hierarchical all-to-all): many small messages between nodes become few large ones. Inside
each node, rank (a, l') hands rank (a, l) all rows meant for local rank l of any node; then the ranks l of all nodes
exchange what each has collected. A row changes node at most once, over the slow link, and local rank at most once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swinmoe.comm.all_to_all import Group, Pending, start, wait
from swinmoe.comm.arrangement import Arrangement, by_expert
from swinmoe.comm.regroup import Regrouping, regroup, take


@dataclass(frozen=True)
class Leg:
    """One all-to-all of a journey."""

    before: Regrouping | None
    """Order in which rows leave; None = as they come."""
    ins: tuple[int, ...]
    """Rows sent to each rank of `group`."""
    outs: tuple[int, ...]
    """Rows received from each."""
    group: Group
    leaving: Arrangement | None = None
    """How rows stand that leave; None = by the rank they go to."""
    arriving: Arrangement | None = None
    """How rows stand that have arrived; None = by the rank that sent them."""


@dataclass(frozen=True)
class Journey:
    """The legs from where rows are to where they are meant to be.

        pending = journey.depart(rows, what)
        pending = journey.change(pending, what)      # from leg to leg; nothing where there is one
        arrived = journey.arrive(pending)            # ordered by the rank that sent them, or as arranged

    Between any two of these calls other work can go on, in the backward pass too.
    """

    legs: tuple[Leg, ...]

    def depart(self, rows: Tensor, what: str) -> Pending:
        """Send `rows` on the first leg."""
        return _begin(rows, self.legs[0], what)

    def change(self, pending: Pending, what: str) -> Pending:
        """Wait for every leg but the last, and send its rows on the next."""
        for leg in self.legs[1:]:
            pending = _begin(wait(pending), leg, what)
        return pending

    def arrive(self, pending: Pending) -> Tensor:
        """Wait for the last leg."""
        return wait(pending)

    def back(self) -> Journey:
        """The way back: what arrives there is in the order in which it left here."""
        legs = []
        after: Regrouping | None = None
        for leg in reversed(self.legs):
            before = None if after is None else after.inverse()
            legs.append(Leg(before, leg.outs, leg.ins, leg.group, leg.arriving, leg.leaving))
            after = leg.before
        assert after is None, "the first leg takes rows in the order they have"
        return Journey(tuple(legs))


def _begin(rows: Tensor, leg: Leg, what: str) -> Pending:
    moved = take(rows, leg.before)
    return start(moved, leg.ins, leg.outs, leg.group, what, leaving=leg.leaving, arriving=leg.arriving)


def _counts(values: Tensor) -> tuple[int, ...]:
    return tuple(values.tolist())


def direct(sent: Tensor, rank: int, group: Group, segments: Tensor | None = None) -> Journey:
    """One all-to-all for rows sorted by destination.

    Args:
        sent: M.
        rank: this rank's number in the group.
        group: the ranks concerned.
        segments: (G, e) int64 on the host, rows that arrive from each rank for each expert: they then stand by expert.
    """
    arriving = None if segments is None else by_expert(segments, len(sent))
    return Journey((Leg(None, _counts(sent[rank]), _counts(sent[:, rank]), group, arriving=arriving),))


def two_stages(
    sent: Tensor,
    rank: int,
    local_size: int,
    inner: Group,
    outer: Group,
    device: torch.device | str = "cpu",
    segments: Tensor | None = None,
) -> Journey:
    """2DH for rows sorted by `departure_order`. What arrives is ordered as after `direct`.

    Args:
        sent: M.
        rank: this rank's number among the G.
        local_size: L; it divides G.
        inner: the ranks of this node, in order.
        outer: the ranks with this local number, in the order of their nodes.
        device: where the rows are.
        segments: as for `direct`.
    """
    nodes = len(sent) // local_size
    node, local = divmod(rank, local_size)
    by_place = sent.view(nodes, local_size, nodes, local_size)  # from (node, local) to (node, local)
    mine = by_place[node, local]
    # After the first stage this rank holds what its node sends to local rank `local` of every node.
    collected = by_place[node, :, :, local]  # (L, nodes): by the neighbour it came from
    order = torch.arange(collected.numel()).view(local_size, nodes).t().reshape(-1)
    return Journey(
        (
            Leg(None, _counts(mine.sum(0)), _counts(collected.sum(1)), inner),
            Leg(
                regroup(collected.reshape(-1), order, device),
                _counts(collected.sum(0)),
                _counts(by_place[:, :, node, local].sum(1)),
                outer,
                arriving=None if segments is None else by_expert(segments, nodes),
            ),
        )
    )


def departure_order(ranks: int, local_size: int | None) -> Tensor:
    """(G,) int64: how rows must be sorted by destination; by rank, for 2DH by (local rank, node)."""
    order = torch.arange(ranks)
    return order if local_size is None else order.view(-1, local_size).t().reshape(-1)
