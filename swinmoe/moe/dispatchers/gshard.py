"""The einsum formulation of GShard (Lepikhin et al. 2021, algorithm 2): masks over tokens, experts and slots.

Shapes: T tokens, D width, E experts, K choices, C slots per expert.

Its masks (T, E, C) cost memory and arithmetic that grow with T², so it is no way to train. It is kept for two things:
as an oracle, since no index, sort or scatter is involved, and as the baseline that profiles compare the rest with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swinmoe.moe.dispatchers.padded import PaddedDispatcher
from swinmoe.moe.precision import without_autocast
from swinmoe.moe.registry import register_dispatcher
from swinmoe.moe.types import DispatchPlan, ExpertRows, Routing


def combine_weights(gates: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
    """(T, K) -> (T, E, C): the gate of each choice at its expert and slot, 0 elsewhere; with ones, the dispatch mask.

    A dropped choice has a place beyond the last slot and so matches none.
    """
    assert plan.slots is not None
    experts = torch.arange(len(plan.counts), device=gates.device)
    slots = torch.arange(plan.slots, device=gates.device)
    to_expert = (routing.expert_ids.unsqueeze(-1) == experts).to(gates.dtype)
    to_slot = (plan.slot.unsqueeze(-1) == slots).to(gates.dtype)
    return torch.einsum("tke,tkc->tec", gates.unsqueeze(-1) * to_expert, to_slot)


@register_dispatcher("gshard")
class GShardDispatcher(PaddedDispatcher):
    """Padded layout by dense products: rows = maskᵀ·x, y = weights·rows. For comparison, not for speed."""

    def scatter(self, x: Tensor, routing: Routing, plan: DispatchPlan) -> ExpertRows:
        """(T, D) -> (E, C, D)."""
        with without_autocast(x):  # tokens are moved, not multiplied: they keep their precision
            mask = combine_weights(torch.ones_like(routing.gates, dtype=x.dtype), routing, plan)
            return ExpertRows(torch.einsum("tec,td->ecd", mask, x), plan.counts)

    def gather(self, rows: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """(E, C, D) -> (T, D)."""
        with without_autocast(rows):
            weights = combine_weights(routing.gates.to(rows.dtype), routing, plan)
            return torch.einsum("tec,ecd->td", weights, rows)
