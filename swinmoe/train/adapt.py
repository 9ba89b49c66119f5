"""Adaptive capacity: the factor of each expert layer follows its load, decided between optimiser steps.

Shapes: E experts, K choices per token, T tokens of a micro-batch on this rank, L adaptive layers.

The factor that stands is a guess from past batches, equal on all ranks because it comes of a maximum over them: one
reduction of L numbers every `every` steps, and nothing inside a forward pass. What a batch itself needs is seen on the
device when its queues are cut (`moe.dispatch.least_cut`): where the guess would drop more than `max_drop`, that batch
gets exactly its need. So the promise never rests on the guess; the guess keeps sizes steady from batch to batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swinmoe.config import AdaptConfig
from swinmoe.models import SwinTransformer
from swinmoe.moe import MoEMlp, RoutingStats, least_cut

Maximum = Callable[[Tensor], Tensor]
"""Of a vector over all ranks, element by element."""


def next_factor(factor: float, need: float, rule: AdaptConfig) -> float:
    """The factor to stand next, from the one that stands and the largest need since the last decision.

    At once up to (1 + margin)·need; down to it only from above (1 + hysteresis) times it; between floor and ceiling.
    """
    target = rule.clamp((1 + rule.margin) * need)
    if target > factor or factor > (1 + rule.hysteresis) * target:
        return target
    return rule.clamp(factor)


class CapacityFollower:
    """Sets the training factor of a model's adaptive layers. Without such layers all its methods do nothing."""

    def __init__(self, model: SwinTransformer) -> None:
        self._layers = {
            name: layer for name, layer in model.moe_layers().items() if layer.cfg.capacity.train.kind == "adaptive"
        }
        for layer in self._layers.values():
            _set_factor(layer, layer.cfg.capacity.train.adapt.clamp(layer.cfg.capacity.train.factor))
        self._needs: dict[str, Tensor] = {}
        """() float64 largest need on this rank since the last decision."""
        self._logged: dict[str, Tensor] = {}
        """(2,) float64 since the last log: largest need, and forward passes that needed more than the factor."""

    @property
    def factors(self) -> dict[str, float]:
        """By layer, the factor that stands."""
        return {name: layer.cfg.capacity.train.factor for name, layer in self._layers.items()}

    def note(self, routing: Mapping[str, RoutingStats]) -> None:
        """Look at one training forward pass of this rank. No host sync."""
        for name, layer in self._layers.items():
            stats = routing[name]
            need = needed_factor(stats, layer)
            beyond = stats.kept.amax() > _slots(layer, stats.tokens)
            before = self._needs.get(name)
            self._needs[name] = need if before is None else torch.maximum(before, need)
            logged = self._logged.get(name)
            now = torch.stack([need, beyond.double()])
            if logged is not None:
                now = torch.stack([torch.maximum(logged[0], need), logged[1] + now[1]])
            self._logged[name] = now

    def decide(self, step: int, maximum: Maximum) -> dict[str, dict[str, float]]:
        """After optimiser step `step`: new factors for the layers that are due, from the needs of all ranks.

        All ranks call it after the same step.

        Returns:
            Of the layers whose factor changes: need, before, after.
        """
        due = [
            name
            for name, layer in self._layers.items()
            if step % layer.cfg.capacity.train.adapt.every == 0 and name in self._needs
        ]
        if not due:
            return {}
        needs = maximum(torch.stack([self._needs.pop(name) for name in due])).tolist()
        changes = {}
        for name, need in zip(due, needs, strict=True):
            layer = self._layers[name]
            policy = layer.cfg.capacity.train
            factor = next_factor(policy.factor, need, policy.adapt)
            if factor != policy.factor:
                changes[name] = {"need": need, "before": policy.factor, "after": factor}
                _set_factor(layer, factor)
        return changes

    def take_log(self, maximum: Maximum, reduce: Maximum) -> dict[str, dict[str, float]]:
        """By layer since the last call, over all ranks: `capacity_factor` that stands, the largest `capacity_need`, and
        `capacity_beyond`, forward passes (of a micro-batch on a rank) that were given more than the factor."""
        if not self._logged:
            return {}
        both = torch.stack(list(self._logged.values()))
        needs, beyond = maximum(both[:, 0]).tolist(), reduce(both[:, 1]).tolist()
        names, self._logged = list(self._logged), {}
        return {
            name: {
                "capacity_factor": self.factors[name],
                "capacity_need": need,
                "capacity_beyond": int(passes),
            }
            for name, need, passes in zip(names, needs, beyond, strict=True)
        }

    def state(self, maximum: Maximum) -> dict[str, Any]:
        """For a checkpoint: factors, and the needs since the last decision, the largest of all ranks."""
        names = list(self._needs)
        needs = maximum(torch.stack([self._needs[name] for name in names])).tolist() if names else []
        return {"factors": self.factors, "needs": dict(zip(names, needs, strict=True))}

    def load(self, state: Mapping[str, Any]) -> None:
        """Back from `state()`. Each rank takes the largest need for its own: the next maximum is the same."""
        for name, factor in state["factors"].items():
            _set_factor(self._layers[name], factor)
        self._needs = {
            name: torch.tensor(need, dtype=torch.float64, device=next(self._layers[name].parameters()).device)
            for name, need in state["needs"].items()
        }
        self._logged = {}


def needed_factor(stats: RoutingStats, layer: MoEMlp) -> Tensor:
    """() float64: the least factor by which one forward pass of this rank drops no more than its layer may.

    K·int(factor·⌈T/E⌉) slots are as many as `least_cut` asks for from factor = ⌈cut/K⌉/⌈T/E⌉ on; 0 without tokens.
    """
    tokens = stats.tokens
    allowed = (layer.cfg.capacity.train.adapt.max_drop * (tokens * layer.top_k).double()).floor().long()
    per_choice = -torch.div(-least_cut(stats.routed, allowed), layer.top_k, rounding_mode="floor")
    return per_choice.double() / _share(layer, tokens).clamp(min=1)


def _slots(layer: MoEMlp, tokens: Tensor) -> Tensor:
    """() int64: `moe.capacity.capacity` of the factor that stands, for a number of tokens on the device."""
    policy = layer.cfg.capacity.train
    return (layer.top_k * (policy.factor * _share(layer, tokens).double()).floor().long()).clamp(min=policy.min_slots)


def _share(layer: MoEMlp, tokens: Tensor) -> Tensor:
    return -torch.div(-tokens, layer.num_experts, rounding_mode="floor")


def _set_factor(layer: MoEMlp, factor: float) -> None:
    assert math.isfinite(factor), factor
    capacity = layer.cfg.capacity
    layer.cfg = replace(layer.cfg, capacity=replace(capacity, train=replace(capacity.train, factor=factor)))
