"""Sums kept on the device between log lines, reduced over ranks and turned into numbers only when logged.

Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swinmoe.moe.stats import merge, summarise
from swinmoe.moe.types import RoutingStats

Reduce = Callable[[Tensor], Tensor]
"""Sum (or another reduction) of a vector over all ranks."""


class RoutingMeter:
    """Each expert layer's `RoutingStats`, added up over micro-batches and steps without a host sync."""

    def __init__(self) -> None:
        self._merged: dict[str, RoutingStats] = {}

    def add(self, routing: Mapping[str, RoutingStats]) -> None:
        """Add one forward pass."""
        for layer, stats in routing.items():
            # Without its graph and its token ids: only sums are kept from step to step.
            light = replace(stats, loss=stats.loss.detach(), expert_ids=stats.expert_ids[:0])
            before = self._merged.get(layer)
            self._merged[layer] = light if before is None else merge(before, light)

    def take(self, reduce: Reduce) -> dict[str, dict[str, Any]]:
        """Per layer the numbers of `moe.stats.summarise` since the last `take`, over all ranks; then start anew."""
        out = {layer: summarise(_over_ranks(stats, reduce)) for layer, stats in self._merged.items()}
        self._merged = {}
        return out


def _over_ranks(stats: RoutingStats, reduce: Reduce) -> RoutingStats:
    """`stats` summed over ranks by one reduction; losses are averaged by tokens."""
    experts, tokens = len(stats.routed), stats.tokens.double().reshape(1)
    losses = [value.double().reshape(1) * tokens for value in stats.losses.values()]
    total = reduce(torch.cat([stats.routed, stats.kept, tokens, stats.entropy_sum.double().reshape(1), *losses]))
    tokens = total[2 * experts]
    means = total[2 * experts + 2 :] / tokens.clamp(min=1)
    return replace(
        stats,
        routed=total[:experts].long(),
        kept=total[experts : 2 * experts].long(),
        tokens=tokens.long(),
        entropy_sum=total[2 * experts + 1],
        losses=dict(zip(stats.losses, means, strict=True)),
    )


class IdleExperts:
    """For how many optimiser steps in a row each expert has received no token on this rank."""

    def __init__(self) -> None:
        self._idle: dict[str, Tensor] = {}
        self._seen: dict[str, Tensor] = {}

    def add(self, routing: Mapping[str, RoutingStats]) -> None:
        """Note the choices of one micro-batch."""
        for layer, stats in routing.items():
            seen = stats.routed > 0
            self._seen[layer] = self._seen[layer] | seen if layer in self._seen else seen

    def step(self) -> None:
        """End of an optimiser step."""
        for layer, seen in self._seen.items():
            idle = self._idle.get(layer, torch.zeros(len(seen), dtype=torch.int64))
            self._idle[layer] = torch.where(seen, 0, idle.to(seen.device) + 1)
        self._seen = {}

    def dead(self, window: int, reduce: Reduce) -> dict[str, int]:
        """Per layer, experts that no rank has sent a token to over the last `window` steps."""
        out = {}
        for layer, idle in self._idle.items():
            alive_ranks = reduce((idle < window).double())
            out[layer] = int((alive_ranks == 0).sum())
        return out

    def state(self, least: Reduce) -> dict[str, list[int]]:
        """For a checkpoint: steps since any rank sent a token, `least` being the minimum over ranks."""
        return {layer: least(idle).tolist() for layer, idle in self._idle.items()}

    def load(self, state: Mapping[str, list[int]]) -> None:
        """Back from `state()`."""
        self._idle = {layer: torch.tensor(values, dtype=torch.int64) for layer, values in state.items()}
