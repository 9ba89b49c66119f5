"""Bytes that one rank sends in an optimiser step, message by message, as `comm.traffic` counts them: closed forms.

Legend: W ranks, ep = ep_size, R = W/ep replicas, n ranks among which tokens travel, g of a weight group. Rows
are those of balanced routing: every rank keeps as many as it sends to each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from swinmoe.config import BalanceLossConfig, RunConfig
from swinmoe.models.counts import count
from swinmoe.profiling.plan.spread import Spread
from swinmoe.profiling.plan.tensors import shares_of, units_of

SUMS: Mapping[str, tuple[tuple[str, int], ...]] = {
    "gshard": (("tokens", 0), ("probs", 1), ("top1", 1)),
    "importance": (("importance", 1),),
    "load": (("load", 1),),
    "importance_load": (("importance", 1), ("load", 1)),
    "importance_load_tutel": (("importance", 1), ("load_tutel", 1)),
    "z": (("tokens", 0), ("z", 0)),
}
"""What each loss sums over the batch, and whether that is a number for each expert (1) or one (0)."""


def loss_sums(losses: BalanceLossConfig, num_experts: int) -> int:
    """Numbers that a layer's losses sum over all ranks; 0 where each rank balances its own batch."""
    if losses.batch != "global":
        return 0
    terms = {term: each for name, terms in SUMS.items() if getattr(losses, name) > 0 for term, each in terms}
    return sum(num_experts if each else 1 for each in terms.values())


def plan_traffic(
    run: RunConfig, spreads: list[Spread], world: int, rank: int | None = None
) -> dict[tuple[str, str], float]:
    """(operation, what) -> bytes that a rank sends to others in a step; nothing that is zero.

    Names are those that `comm.listen` gives, without the layer's.

    Args:
        run: the config.
        spreads: of its expert layers.
        world: ranks.
        rank: whose; None = one that sends most. Under ZeRO they differ by what they step.
    """
    sent: dict[tuple[str, str], float] = defaultdict(float)
    if world == 1:
        return {}
    micro_batches, parallel = run.train.accumulation, run.parallel
    for spread in spreads:
        for key, value in _layer(spread, world).items():
            sent[key] += micro_batches * value
    ep = parallel.ep_size if spreads else 1
    moved = _trained_experts(spreads)
    wide = 8 if run.train.precision == "fp64" else 4
    if parallel.shard_dense:
        gathered, summed = _fsdp(run, spreads, world)
        sent["all_gather", "gathering dense parameters"] = 2 * micro_batches * wide * gathered
        sent["reduce_scatter", "summing dense gradients"] = wide * summed
    else:
        whole = sum(s.parallel.ep_size * n for s, n in zip(spreads, moved, strict=True)) if ep > 1 else 0
        dense = count(run.model).trainable - whole
        sent["all_reduce", "summing dense gradients"] = 2 * dense * wide * (world - 1) / world
    if ep > 1:
        replicas = world // ep
        total = wide * sum(moved)
        sent["all_reduce", "summing expert gradients over replicas"] = 2 * total * (replicas - 1) / replicas
    if ep > 1 or parallel.shard_dense:
        sent["all_reduce", "clipping"] = 2 * wide * (world - 1) / world
    if parallel.zero:
        to_all, to_replicas = shares_of(run, spreads, world, rank).stepped
        what = "sending updated parameters to the ranks that did not step them"
        sent["broadcast", what] = wide * (to_all * (world - 1) + to_replicas * (world // ep - 1))
    return {key: value for key, value in sent.items() if value}


def _fsdp(run: RunConfig, spreads: list[Spread], world: int) -> tuple[float, float]:
    """Numbers that a rank sends when all units are gathered once, and when their gradients are summed: every rank sends
    as many rows of a tensor as the one that keeps most of them."""
    tensors = [tensor for unit in units_of(run, spreads) for tensor in unit]
    gathered = sum(t.rows(world) for t in tensors)
    summed = sum(t.rows(world) for t in tensors if t.group is not None)
    return (world - 1) * gathered, (world - 1) * summed


def _trained_experts(spreads: list[Spread]) -> list[float]:
    """Numbers of this rank's experts that train, layer by layer."""
    found = []
    for spread in spreads:
        frozen = spread.layer.dim if spread.moe.experts.fc2_bias == "frozen-zero" else 0
        held = spread.layer.num_experts * (spread.layer.expert_params - frozen)
        found.append(held / spread.parallel.ep_size)
    return found


def _layer(spread: Spread, world: int) -> dict[tuple[str, str], float]:
    """Of one layer and micro-batch."""
    n, g, wide = spread.parallel.token_group, spread.parallel.weight_group, spread.at.wide
    sent: dict[tuple[str, str], float] = {}
    sums = loss_sums(spread.moe.losses, spread.layer.num_experts)
    sent["all_reduce", "summing statistics"] = 2 * sums * wide * (world - 1) / world
    again = 1 + spread.recomputed
    if n > 1:
        if spread.padded:
            sent["all_reduce", "agreeing on slots"] = 2 * 8 * (n - 1) / n
        else:
            sent["all_gather", "gathering counts"] = (n - 1) * spread.layer.num_experts * 8
        moving = spread.volume / spread.busiest * _leaving(spread)
        sent["all_to_all", "sending tokens to experts"] = (again + 1) * moving
        sent["all_to_all", "returning tokens from experts"] = (again + 1) * moving
    if g > 1:
        sent["all_gather", "gathering expert weights"] = again * (g - 1) * spread.weight_bytes
        frozen = spread.layer.dim * spread.layer.num_experts / spread.parallel.ep_size
        back = spread.weight_bytes - (wide * frozen if spread.moe.experts.fc2_bias == "frozen-zero" else 0)
        sent["reduce_scatter", "gathering expert weights"] = (g - 1) * back
    return sent


def _leaving(spread: Spread) -> float:
    """Of the rows that travel, the share that leaves this rank, over all stages; 2DH sends some of them twice."""
    at = spread.journey
    if spread.parallel.exchange == "flat" or at.nodes == 1:
        return (at.ranks - 1) / at.ranks
    return (at.per_node - 1) / at.per_node + (at.nodes - 1) / at.nodes
