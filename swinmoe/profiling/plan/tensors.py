"""A model's parameters tensor by tensor, and what of them a rank has once FSDP2 or ZeRO has dealt them out.

Neither divides evenly. FSDP2 gives each of W ranks ⌈n/W⌉ rows of a tensor of n rows, so that the last ranks may have
none; ZeRO gives away whole tensors, the largest first, each to whoever has least.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from heapq import heapreplace
from math import prod

from swinmoe.config import CapacityConfig, ModelConfig, OptimConfig, RunConfig
from swinmoe.models import build_model
from swinmoe.parallel import gathered_units
from swinmoe.profiling.plan.spread import Spread
from swinmoe.train import optimizer_groups


@dataclass(frozen=True)
class Held:
    """One parameter, whole."""

    shape: tuple[int, ...]
    unit: str
    """What FSDP2 lets it travel with."""
    layer: str | None
    """The expert layer whose experts it belongs to."""
    group: int | None
    """Of the optimiser; None = it does not train."""

    @property
    def size(self) -> int:
        """Numbers."""
        return prod(self.shape)

    def rows(self, ranks: int, rank: int = 0) -> int:
        """Numbers in the rows that one of so many ranks keeps; the first has most."""
        share = -(-self.shape[0] // ranks)
        here = min(max(0, self.shape[0] - rank * share), share)
        return here * prod(self.shape[1:])


def tensors_of(run: RunConfig) -> tuple[Held, ...]:
    """All parameters of the run's model, in its order."""
    model = run.model
    if model.moe is not None:  # capacity has no parameters, and layers of their own are no key of a cache
        model = replace(model, moe=replace(model.moe, capacity=CapacityConfig()))
    return _tensors(model, run.optim)


@lru_cache(maxsize=64)
def _tensors(config: ModelConfig, optim: OptimConfig) -> tuple[Held, ...]:
    model = build_model(config, device="meta")
    unit = {name: place for place, names in gathered_units(model).items() for name in names}
    layer = {id(parameter): name for name, moe in model.moe_layers().items() for parameter in moe.experts.parameters()}
    group = {
        id(parameter): number
        for number, group in enumerate(optimizer_groups(model, optim))
        for parameter in group["params"]
    }
    return tuple(
        Held(tuple(p.shape), unit[name], layer.get(id(p)), group.get(id(p))) for name, p in model.named_parameters()
    )


def dealt(sizes: Iterable[Sequence[int]], ranks: int) -> list[int]:
    """Numbers that each of `ranks` ranks steps under ZeRO.

    Args:
        sizes: of the tensors of each of the optimiser's groups, in order.
    """
    least = [(0, rank) for rank in range(ranks)]
    for group in sizes:
        for size in sorted(group, reverse=True):
            load, rank = least[0]
            heapreplace(least, (load + size, rank))
    loads = [0] * ranks
    for load, rank in least:
        loads[rank] = load
    return loads


@dataclass(frozen=True)
class Shares:
    """Numbers of one rank: the one that has most, or the one asked for."""

    dense: float
    """Parameters that it keeps; experts that every rank would hold count as `experts`."""
    experts: float
    gradients: float
    moments: float
    """One of Adam's two."""
    stepped: tuple[float, float]
    """Of `moments`, those whose parameters ZeRO sends after a step: dense ones to all ranks, experts' to replicas."""
    updated: tuple[float, float]
    """What ZeRO sends, of all ranks together, to one that steps none of it."""


def shares_of(run: RunConfig, spreads: Sequence[Spread], world: int, rank: int | None = None) -> Shares:
    """What a rank keeps and steps of the model's parameters.

    Args:
        spreads: of the expert layers.
        world: ranks.
        rank: whose share; None = the largest one.
    """
    parallel = run.parallel
    ep = parallel.ep_size if spreads else 1
    spread = [t for t in tensors_of(run) if t.layer is not None and ep > 1]
    whole = [t for t in tensors_of(run) if t.layer is None or ep == 1]

    def rows(tensor: Held) -> int:
        return tensor.rows(world, rank or 0) if parallel.shard_dense and world > 1 else tensor.size

    dense = sum(rows(t) for t in whole if t.layer is None)
    experts = sum(rows(t) for t in whole if t.layer is not None) + sum(t.size for t in spread) / ep
    kept = float(sum(rows(t) for t in whole if t.group is not None))
    held = sum(t.size for t in spread if t.group is not None) / ep
    gradients = kept + held
    stepped = updated = (0.0, 0.0)
    if parallel.zero and world > 1:
        if not parallel.shard_dense:
            stepped, updated = (_share(whole, world, rank), 0.0), (kept, 0.0)
            kept = stepped[0]
        if world > ep and spread:
            share = _share(spread, world // ep, None if rank is None else rank // ep) / ep
            stepped, updated = (stepped[0], share), (updated[0], held)
            held = share
    return Shares(dense, experts, gradients, kept + held, stepped, updated)


def _share(tensors: Sequence[Held], ranks: int, rank: int | None) -> float:
    groups = sorted({t.group for t in tensors if t.group is not None})
    loads = dealt(([t.size for t in tensors if t.group == group] for group in groups), ranks)
    return float(max(loads) if rank is None else loads[rank])


def units_of(run: RunConfig, spreads: Sequence[Spread]) -> list[list[Held]]:
    """What FSDP2 gathers at once, unit by unit; spread experts are in none."""
    ep = run.parallel.ep_size if spreads else 1
    units: dict[str, list[Held]] = {}
    for tensor in tensors_of(run):
        if tensor.layer is None or ep == 1:
            units.setdefault(tensor.unit, []).append(tensor)
    return [*units.values()]


def largest_unit(run: RunConfig, spreads: Sequence[Spread]) -> int:
    """Numbers in it."""
    return max(sum(t.size for t in unit) for unit in units_of(run, spreads))
