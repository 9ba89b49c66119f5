"""Which experts a model's data asks for: the measure by which experts are kept, copied and merged.

Shapes: T tokens, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swinmoe.errors import RoutingError
from swinmoe.moe import MoEMlp, Routing


@dataclass(frozen=True)
class ExpertUsage:
    """What one layer's router asked of its experts, before any choice was dropped."""

    chosen: Tensor
    """(E,) float64: choices of each expert."""
    gates: Tensor
    """(E,) float64: sum of each expert's gates over the tokens that chose it."""
    tokens: int
    """T."""


@contextmanager
def measure_usage(model: nn.Module) -> Iterator[dict[str, ExpertUsage]]:
    """While inside, every pass of `model` is counted; the result is filled in when it is left.

    Run it in evaluation mode: gate noise would be counted too. No host copies until the end.

    Returns:
        By the layer's module name.

    Raises:
        RoutingError: no expert layer has seen a token.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MoEMlp)}
    sums: dict[str, Tensor] = {}
    tokens = dict.fromkeys(layers, 0)
    handles = []

    def watch(name: str, layer: MoEMlp) -> None:
        def note(_: nn.Module, __: object, routing: Routing) -> None:
            ids, gates = routing.expert_ids.flatten(), routing.gates.detach().double().flatten()
            new = torch.stack((torch.ones_like(gates), gates))
            total = sums.get(name)
            if total is None:
                total = sums[name] = new.new_zeros(2, layer.num_experts)
            total.index_add_(1, ids, new)
            tokens[name] += len(routing.expert_ids)

        handles.append(layer.router.register_forward_hook(note))

    for name, layer in layers.items():
        watch(name, layer)
    found: dict[str, ExpertUsage] = {}
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    if not any(tokens.values()):
        raise RoutingError("no expert layer of this model has seen a token; run it on data inside `measure_usage`")
    found |= {name: ExpertUsage(total[0].cpu(), total[1].cpu(), tokens[name]) for name, total in sums.items()}


def usage_of(usage: Mapping[str, ExpertUsage], name: str) -> ExpertUsage:
    """The layer's own; `RoutingError` if it was not measured."""
    if name not in usage:
        raise RoutingError(f"usage was measured of {sorted(usage)}, not of {name!r}; measure this very model")
    return usage[name]
