"""Routing statistics: added up over micro-batches and ranks, and turned into plain numbers where something is logged.

Shapes: T tokens, E experts, K choices.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from swinmoe.moe.types import RoutingStats


def merge(a: RoutingStats, b: RoutingStats, *, keep_ids: bool = False) -> RoutingStats:
    """The statistics of `a` and `b` taken together, e.g. two micro-batches of one layer. No host sync.

    Counts and sums add. Losses, which are means over a batch, are averaged by tokens; `loss` stays differentiable.
    `expert_ids` are concatenated if `keep_ids` (to draw them), else dropped: (0, K).
    """
    total = a.tokens + b.tokens
    share = a.tokens / total.clamp(min=1)  # 0-dim tensors: the division stays on the device

    def mean(x: Tensor, y: Tensor) -> Tensor:
        # Without tokens on either side both losses are zero, and so is this.
        weight = share.to(x.dtype)
        return x * weight + y * (1 - weight)

    return RoutingStats(
        routed=a.routed + b.routed,
        kept=a.kept + b.kept,
        tokens=total,
        entropy_sum=a.entropy_sum + b.entropy_sum,
        losses={name: mean(value, b.losses[name]) for name, value in a.losses.items()},
        loss=mean(a.loss, b.loss),
        expert_ids=torch.cat([a.expert_ids, b.expert_ids]) if keep_ids else a.expert_ids[:0],
    )


def summarise(stats: RoutingStats) -> dict[str, Any]:
    """`stats` as plain Python numbers. Copies to the host, so call it on logging steps only.

    Returns:
        routed, kept: choices per expert before and after drops (lists of E ints);
        drop_fraction: share of the choices that were dropped;
        token_entropy: mean entropy of a token's expert probabilities over ln E (1 = undecided, 0 = certain);
        load_entropy: entropy of the routed load over ln E (1 = balanced);
        max_over_mean: routed load of the busiest expert over the mean load (1 = balanced);
        losses: each computed auxiliary loss, unweighted.
        Ratios without tokens or choices are 0; with one expert both entropies are 0.
    """
    routed: list[int] = stats.routed.tolist()
    kept: list[int] = stats.kept.tolist()
    tokens, choices = int(stats.tokens), sum(routed)
    nats = math.log(len(routed))
    load_nats = -sum(n / choices * math.log(n / choices) for n in routed if n)
    return {
        "routed": routed,
        "kept": kept,
        "drop_fraction": 1 - sum(kept) / choices if choices else 0.0,
        "token_entropy": float(stats.entropy_sum) / tokens / nats if tokens and nats else 0.0,
        "load_entropy": load_nats / nats if nats else 0.0,
        "max_over_mean": max(routed) * len(routed) / choices if choices else 0.0,
        "losses": {name: float(value) for name, value in stats.losses.items()},
    }
