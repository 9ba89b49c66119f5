"""All-to-all of rows, cut into a start and a wait so that computation fits between them, in both directions.

Shapes: N rows held here = sum(ins), D width, G ranks in the group; ins (G,) rows sent to each rank, outs (G,) rows
received from each. Received rows come in rank order of their senders.

Each of `start` and `wait` is a node of the autograd graph. The backward of `wait` starts the reverse exchange on the
same group and the backward of `start` waits for it, so whatever autograd runs between the two overlaps with the
transfer. The edge between the nodes carries an empty token: the received buffer has another shape than the rows sent,
and must not be touched while it is in flight. It travels beside the graph, in a `_Hop`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from swinmoe.comm.arrangement import Arrangement
from swinmoe.comm.failure import naming
from swinmoe.comm.neighbours import Transfer, link_of
from swinmoe.comm.regroup import fold, take
from swinmoe.comm.traffic import note

Group = dist.ProcessGroup | None
"""A process group; None = this process alone, where nothing travels."""


class _Hop:
    """One exchange and its reverse. It keeps buffers and the pending work, and holds no reference to the graph."""

    def __init__(
        self,
        ins: Sequence[int],
        outs: Sequence[int],
        group: dist.ProcessGroup,
        what: str,
        leaving: Arrangement | None,
        arriving: Arrangement | None,
    ) -> None:
        self.ins, self.outs, self.group, self.what = list(ins), list(outs), group, what
        self.leaving, self.arriving = leaving, arriving
        self._flight: tuple[dist.Work | Transfer, Tensor, Tensor, Arrangement | None] | None = None

    def launch(self, rows: Tensor, *, back: bool = False) -> None:
        """Send `rows` on their way, or gradients back."""
        sends, receives, leaving, arriving = self.ins, self.outs, self.leaving, self.arriving
        if back:
            sends, receives, leaving, arriving = receives, sends, arriving, leaving
        me = self.group.rank()
        note("all_to_all", self.what, len(sends), (sum(sends) - sends[me]) * rows[:1].nbytes)
        # Gloo needs contiguous memory; gradients of a sum arrive expanded, with strides of zero.
        rows = rows.contiguous()
        received = rows.new_empty((sum(receives), *rows.shape[1:]))
        work: dist.Work | Transfer | None
        with naming(self.what):
            link = link_of(self.group) if rows.device.type == "cpu" else None
            if link is not None:
                work = link.send(rows, sends, receives, leaving)
            else:
                rows = rows if leaving is None else fold(rows, leaving.change(rows.device))
                work = dist.all_to_all_single(received, rows, receives, sends, group=self.group, async_op=True)
        assert work is not None
        # The sent rows are kept too: their memory may not be reused before the transfer is over.
        self._flight = (work, received, rows, arriving)

    def land(self) -> Tensor:
        assert self._flight is not None, "wait() without a start(), or a second wait()"
        (work, received, _, arriving), self._flight = self._flight, None
        with naming(self.what):
            if isinstance(work, Transfer):
                work.wait(received, arriving)
                return received
            work.wait()
        return received if arriving is None else take(received, arriving.change(received.device))


@dataclass(frozen=True)
class Pending:
    """An exchange under way. Hand it to `wait` exactly once."""

    token: Tensor
    """(0,), the edge of the autograd graph; with a group of one, the rows themselves."""
    hop: _Hop | None
    """None with a group of one."""


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, hop: _Hop) -> Tensor:
        ctx.hop = hop
        hop.launch(rows)
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.hop.land(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, hop: _Hop) -> Tensor:
        ctx.hop = hop
        return hop.land()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        hop = ctx.hop
        hop.launch(grad, back=True)
        return grad.new_empty(0), None


def start(
    rows: Tensor,
    ins: Sequence[int],
    outs: Sequence[int],
    group: Group,
    what: str = "all-to-all",
    *,
    leaving: Arrangement | None = None,
    arriving: Arrangement | None = None,
) -> Pending:
    """Begin sending `rows` (N, D): the first `ins[0]` of them to rank 0 of `group`, the next `ins[1]` to rank 1, ...

    Every rank of the group must call it, with `ins` and `outs` that agree pairwise (`ins[d]` here = `outs[s]` there)
    and rows that all require a gradient or all do not; ranks without rows too. Zero counts are legal.

    Args:
        rows: (N, D), N = sum(ins).
        ins: rows to send to each rank of the group.
        outs: rows to receive from each rank of the group.
        group: the ranks concerned; None = this process alone.
        what: names this exchange in the error raised when it does not finish.
        leaving: how `rows` stand here; None = in rank order.
        arriving: how received rows shall stand; None = in rank order.
    """
    assert sum(ins) == rows.shape[0], f"{what}: {rows.shape[0]} rows, but the counts say {list(ins)}"
    if group is None:
        assert list(ins) == list(outs) == [rows.shape[0]], f"{what}: alone, every row stays: {list(ins)}, {list(outs)}"
        rows = rows if leaving is None else fold(rows, leaving.change(rows.device))
        return Pending(rows if arriving is None else take(rows, arriving.change(rows.device)), None)
    assert len(ins) == len(outs) == group.size(), f"{what}: {group.size()} ranks, counts for {len(ins)}, {len(outs)}"
    hop = _Hop(ins, outs, group, what, leaving, arriving)
    return Pending(_Start.apply(rows, hop), hop)


def wait(pending: Pending) -> Tensor:
    """The received rows (sum(outs), D), ordered by sending rank unless `start` was told otherwise.

    Raises:
        CollectiveError: the exchange failed or timed out.
    """
    return pending.token if pending.hop is None else _Wait.apply(pending.token, pending.hop)


def all_to_all_rows(
    rows: Tensor, ins: Sequence[int], outs: Sequence[int], group: Group, what: str = "all-to-all"
) -> Tensor:
    """`wait(start(...))`: an exchange with nothing in between."""
    return wait(start(rows, ins, outs, group, what))
