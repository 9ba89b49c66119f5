"""Rows and FLOPs of a whole model's step, layer by layer: a row costs what its layer is wide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch

from swinmoe.comm import all_reduce_max
from swinmoe.config import ModelConfig, RunConfig
from swinmoe.models.counts import ModelCounts, count, expert_row_flops, stage_grids
from swinmoe.moe import MoEMlp, RoutingStats, capacity
from swinmoe.parallel import Mesh, global_sum
from swinmoe.profiling.flops import Rows


def count_rows(
    layers: Mapping[str, MoEMlp], routing: Mapping[str, RoutingStats], mesh: Mesh, *, training: bool
) -> dict[str, Rows]:
    """Choices of one micro-batch over all ranks, by layer. A collective call."""
    rows = {}
    for name, stats in routing.items():
        layer = layers[name]
        routed, kept = (int(n) for n in global_sum(torch.stack([stats.routed.sum(), stats.kept.sum()]), mesh))
        computed = kept
        if layer.dispatcher_taken()[0] in ("padded", "tutel", "gshard"):
            policy = layer.cfg.capacity.train if training else layer.cfg.capacity.eval
            slots = stats.kept.max()
            if policy.kind == "fixed":
                own_slots = capacity(policy, int(stats.tokens), layer.num_experts, layer.top_k)
                slots = torch.tensor(own_slots, device=stats.kept.device)
            most = int(all_reduce_max(slots, mesh.world_group, "comparing slots"))
            computed = mesh.world * layer.num_experts * most
        rows[name] = Rows(routed, kept, computed)
    return rows


def summed(rows: Mapping[str, Rows]) -> Rows:
    """Of all layers together."""
    own = rows.values()
    return Rows(sum(r.routed for r in own), sum(r.kept for r in own), sum(r.computed for r in own))


def model_flops(counts: ModelCounts, rows: Mapping[str, Rows], run: RunConfig, *, backward: bool) -> dict[str, int]:
    """The three counts of a step, over all ranks; see `swinmoe.profiling.flops`.

    `model`: experts for the choices that were kept; `hardware`: experts for all computed rows, and what checkpointing
    computes again; `dense_equivalent`: every choice computed once. Shared experts compute every token in all three.

    Args:
        counts: of `run.model`.
        rows: of one micro-batch, by layer.
        run: whose step it is.
        backward: with the backward pass.
    """
    images, parts = run.train.batch_size, run.train.accumulation
    passes = 3 if backward else 1
    whole = counts.step_flops(images, parts) if backward else images * (counts.flops - counts.batch_flops)
    whole += 0 if backward else parts * counts.batch_flops
    cost = expert_row_flops(run.model)
    dropped = passes * parts * sum(cost[name] * (own.routed - own.kept) for name, own in rows.items())
    more = passes * parts * sum(cost[name] * (own.computed - own.routed) for name, own in rows.items())
    if backward:
        more += images * recomputed_flops(run.model)
    return {"model": whole - dropped, "hardware": whole + more, "dense_equivalent": whole}


def recomputed_flops(config: ModelConfig) -> int:
    """Products that the backward pass computes again for one image: attention and MLPs of checkpointed stages,
    scores of sequential attention. Recomputation ends with what is needed, so that a last product may be spared."""
    whole, again = _blocks_flops(config), 0
    for stage, grid in enumerate(stage_grids(config)):
        if config.recomputes(stage):
            again += whole - _blocks_flops(_without_stage(config, stage))
        elif config.chunks_of(stage) > 1:
            again += config.depths[stage] * 2 * prod(grid.padded) * grid.area * config.embed_dim * 2**stage
    return again


def _blocks_flops(config: ModelConfig) -> int:
    parts = count(config).by_part
    return sum(parts[name].flops for name in ("attention", "mlp", "experts") if name in parts)


def _without_stage(config: ModelConfig, stage: int) -> ModelConfig:
    depths, blocks = list(config.depths), list(config.moe_blocks)
    depths[stage] = 0
    if blocks:
        blocks[stage] = ()
    moe = config.moe if any(blocks) else None
    return replace(config, depths=tuple(depths), moe_blocks=tuple(blocks), moe=moe, grad_checkpointing=False)
