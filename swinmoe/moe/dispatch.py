"""Routing -> DispatchPlan: the queue of every expert, who is dropped, and which row of the layout each choice takes.

Shapes: T tokens, E experts, K choices, C capacity, M rows of the layout (ragged: N kept choices; padded: E·slots).

A queue is filled choice by choice: first choices of all tokens in token order, then second choices, and so on, as in
GShard and Tutel; batch-prioritised routing orders the tokens by their highest score instead (V-MoE, §4).
All of it is index algebra on the device: no loop over experts and no host sync.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swinmoe import native as kernels
from swinmoe.moe.types import DispatchPlan, Queues, Routing


def queue(
    routing: Routing,
    num_experts: int,
    capacity: int | None,
    *,
    batch_prioritized: bool = False,
    allowed: int | None = None,
    native: bool = True,
) -> Queues:
    """Line the choices up before their experts, and cut the queues at `capacity` (None = nowhere).

    Where that would drop more than `allowed` choices, the cut is the nearest one that does not. It is found on the
    device, and nothing waits for it. `native`: by our kernel in C++, on a CPU that can have it.
    """
    num_tokens = routing.expert_ids.shape[0]
    turn = None
    if batch_prioritized:
        turn = routing.probs.detach().amax(1).argsort(descending=True, stable=True)
    lines = kernels.line_up if native and kernels.can_walk(routing.expert_ids, dtype=torch.int64) else _line_up
    slot, routed = lines(routing.expert_ids, turn, num_experts)
    # A token names an expert once, so no queue is longer than T. A symbolic T (torch.export) answers no such question.
    if capacity is None or (isinstance(num_tokens, int) and capacity >= num_tokens):
        return Queues(slot, None, routed, routed)
    if allowed is None:
        return Queues(slot, slot < capacity, routed, routed.clamp(max=capacity))
    cut = least_cut(routed, allowed).clamp(min=capacity)
    return Queues(slot, slot < cut, routed, routed.minimum(cut))


def _line_up(expert_ids: Tensor, turn: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor]:
    """(T, K) each choice's place, and (E,) lengths; tokens in the order of `turn` (T,), or their own."""
    num_tokens, top_k = expert_ids.shape
    if turn is not None:
        expert_ids = expert_ids.index_select(0, turn)
    line = expert_ids.t().reshape(-1)  # choice by choice, tokens in order of priority
    order = line.argsort(stable=True)
    routed = _count(line, num_experts)
    first = routed.cumsum(0) - routed
    place = torch.arange(num_tokens * top_k, device=line.device) - first.index_select(0, line.index_select(0, order))
    slot = torch.empty_like(line).index_copy_(0, order, place).view(top_k, num_tokens).t()
    if turn is not None:
        slot = torch.empty_like(slot).index_copy_(0, turn, slot)
    return slot, routed


def least_cut(routed: Tensor, allowed: int | Tensor) -> Tensor:
    """() int64: the smallest C with Σ_e max(0, routed_e − C) ≤ `allowed`, for queues of length `routed` (E,).

    With the lengths in descending order and S_j the sum of the first j, the left side is max_j (S_j − j·C): the sum
    over any other j queues is no larger. So C = max_j ⌈(S_j − allowed)/j⌉, and at least 0.
    """
    longest = routed.sort(descending=True).values.cumsum(0)
    queues = torch.arange(1, len(routed) + 1, device=routed.device)
    return -torch.div(allowed - longest, queues, rounding_mode="floor").amin().clamp(max=0)


def _count(ids: Tensor, num_experts: int) -> Tensor:
    """(E,) occurrences; `bincount` would copy to the host on a GPU."""
    return ids.new_zeros(num_experts).index_add_(0, ids, torch.ones_like(ids))


def plan(
    routing: Routing, queues: Queues, *, rows: int | None = None, slots: int | None = None, native: bool = True
) -> DispatchPlan:
    """Give every kept choice its row.

    Args:
        routing: what the router decided.
        queues: from `queue`.
        rows: ragged layout: N, the kept choices, known on the host.
        slots: padded layout: rows per expert.
        native: our kernels in C++ may be taken, here and where rows are carried.
    """
    expert_ids = routing.expert_ids
    slot, kept, routed, counts = queues
    if slots is not None:
        size = len(counts) * slots
        # By a product: `slots` may be a symbol (torch.export), of which nobody may ask whether it is a step above 0.
        first = torch.arange(len(counts), device=expert_ids.device) * slots
    else:
        assert rows is not None, "the ragged layout needs the number of kept rows"
        size = rows
        first = counts.cumsum(0) - counts
    give = kernels.give_rows if native and kernels.can_walk(expert_ids, dtype=torch.int64) else _give_rows
    row, position = give(expert_ids, slot, kept, first, size)
    return DispatchPlan(row, position, slot, kept, counts, routed, slots, native)


def _give_rows(
    expert_ids: Tensor, slot: Tensor, kept: Tensor | None, first: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """(M,) the choice in each row, -1 in those without, and (T, K) the row of each choice; experts begin at `first`."""
    position = first[expert_ids] + slot
    # One more row than there are takes all the dropped, so that no mask needs a data-dependent shape.
    target = position if kept is None else torch.where(kept, position, size)
    choice = torch.full((size + 1,), -1, dtype=torch.int64, device=expert_ids.device)
    choice.index_copy_(0, target.reshape(-1), torch.arange(expert_ids.numel(), device=expert_ids.device))
    return choice[:size], position if kept is None else torch.where(kept, position, 0)
