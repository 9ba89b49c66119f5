"""Routing with a load that is asked for: balance, or a few experts that everybody wants.

Shapes: T tokens, E experts, K choices.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from swinmoe.moe import Router
from swinmoe.moe.types import Routing

_GOLDEN = (math.sqrt(5) - 1) / 2


class ForcedRouter(nn.Module):
    """A router whose choices can be overruled: it does all its work, and `expert_ids` replace what it found.

    Args:
        router: of the layer.
        normalize_gates: as the layer's.
    """

    def __init__(self, router: Router, normalize_gates: bool = False) -> None:
        super().__init__()
        self.inner: Router = router
        self.normalize_gates = normalize_gates
        self.skew: float | None = None
        """None: the router's own choice."""
        self._ids: dict[tuple[int, int, int, float, torch.device], Tensor] = {}

    def forward(self, tokens: Tensor, noise: Tensor | None = None) -> Routing:
        """As the router, with `skew`'s experts if there is one."""
        routing: Routing = self.inner(tokens, noise)
        if self.skew is None:
            return routing
        num_tokens, num_experts = routing.logits.shape
        top_k = routing.expert_ids.shape[1]
        key = (num_tokens, num_experts, top_k, self.skew, tokens.device)
        if key not in self._ids:
            self._ids[key] = skewed_ids(num_tokens, num_experts, top_k, self.skew).to(tokens.device)
        ids = self._ids[key]
        gates = routing.probs.gather(1, ids)
        if self.normalize_gates and top_k > 1:
            gates = gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).eps)
        return replace(routing, expert_ids=ids, gates=gates)

    def update_bias(self, routed: Tensor) -> None:
        """As the router."""
        self.inner.update_bias(routed)


def skewed_ids(num_tokens: int, num_experts: int, top_k: int, skew: float) -> Tensor:
    """(T, K) int64: K different experts for each token, expert e in a share proportional to 1/(e + 1)^skew.

    A token meets an expert once, so no share can exceed one expert per token: what would is spread over the others.
    Skew 0 is balance to within one choice.
    """
    if skew == 0:
        return (torch.arange(num_tokens * top_k) % num_experts).view(num_tokens, top_k)
    wanted = shares(num_experts, top_k, skew)
    ends = wanted.cumsum(0)
    ends[-1] = top_k  # against rounding
    # Systematic sampling: points one apart from a start that covers [0, 1) evenly over tokens. An expert whose share is
    # at most 1 is never met twice.
    starts = torch.arange(num_tokens, dtype=torch.float64) * _GOLDEN % 1
    points = starts.unsqueeze(1) + torch.arange(top_k, dtype=torch.float64)
    return torch.searchsorted(ends, points, right=True).clamp(max=num_experts - 1)


def shares(num_experts: int, top_k: int, skew: float) -> Tensor:
    """(E,) float64, choices of each expert per token, at most 1, summing to K."""
    weight = torch.arange(1, num_experts + 1, dtype=torch.float64) ** -skew
    wanted = torch.zeros_like(weight)
    free = torch.ones(num_experts, dtype=torch.bool)
    left = float(top_k)
    while bool(free.any()):
        wanted[free] = left * weight[free] / weight[free].sum()
        over = free & (wanted > 1)
        if not bool(over.any()):
            break
        wanted[over] = 1.0
        free &= ~over
        left = top_k - float((~free).sum())
    return wanted
