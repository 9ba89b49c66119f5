"""Bytes of one rank, class by class: parameters, gradients, Adam's moments, activations, dispatch buffers.

Legend as in `work`: b images, P and T tokens of padded map and map, D width, F hidden width, S attention weights of an
image, N rows of an expert layer; w and p bytes of an element on the main branch and in products.

Parameters, gradients and moments are exact. Activations are what autograd keeps for the backward pass, tensor by tensor
of the operators as they are written; what an operator needs only while it runs is in `transient`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

from swinmoe.config import ModelConfig, resolve_style
from swinmoe.models.counts import count, stage_grids
from swinmoe.profiling.plan.spread import Spread
from swinmoe.profiling.plan.work import Setting


@dataclass(frozen=True)
class Tactics:
    """Ways to need less memory than plain data parallelism."""

    checkpointing: bool = False
    """Blocks keep their input alone, and are computed again in the backward pass."""
    zero: bool = False
    """ZeRO-1: moments are cut over the ranks that hold the same parameters."""
    fsdp: bool = False
    """Dense parameters, gradients and moments are cut over all ranks, and gathered block by block."""
    sequential_stages: int = 0
    """First stages in which windows attend in turns, and are computed again: no attention weights are kept."""


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    dense: float
    """Dense parameters."""
    experts: float
    """Expert parameters on this rank."""
    gradients: float
    moments: float
    """Adam's two, and the moving average of the weights where there is one."""
    activations: float
    dispatch: float
    """Rows that lie between scatter and gather of expert layers, kept for the backward pass or on their way."""
    transient: float
    """What the largest block needs only while it runs, and casts of the weights."""

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


def params_here(config: ModelConfig, spreads: list[Spread]) -> tuple[float, float, float]:
    """(dense, this rank's experts, of all of these those that train), in numbers. Experts that every rank holds whole
    (ep_size 1) count as experts here, though gradients are summed like dense ones."""
    counts = count(config)
    routed = sum(s.layer.num_experts * s.layer.expert_params for s in spreads)
    here = sum(s.params_here for s in spreads)
    frozen = counts.total - counts.trainable
    return counts.total - routed, here, counts.total - routed + here - frozen * (here / routed if routed else 1.0)


def plan_memory(
    config: ModelConfig,
    spreads: list[Spread],
    at: Setting,
    world: int,
    tactics: Tactics | None = None,
    *,
    averaged: bool = False,
) -> Memory:
    """What one rank needs at the end of a micro-batch's forward pass, when most is alive.

    Args:
        config: the model.
        spreads: of its expert layers, in order.
        at: micro-batch and precision.
        world: ranks.
        tactics: None = none.
        averaged: a moving average of the weights is kept.
    """
    tactics = tactics or Tactics(checkpointing=config.recomputes_all)
    dense, experts, trained = params_here(config, spreads)
    trained_experts = max(0.0, trained - dense)
    ep = spreads[0].parallel.ep_size if spreads else 1
    replicas = world // ep
    shards = world if tactics.fsdp else 1
    halves = world if tactics.zero or tactics.fsdp else 1
    expert_halves = (replicas if tactics.zero else 1) if ep > 1 else halves
    blocks = [_block(config, stage, at, tactics) for stage in range(len(config.depths))]
    kept, running = _activations(config, spreads, blocks, at, tactics)
    rows = [_rows_kept(s) for s in spreads]
    kept_rows = 0.0 if tactics.checkpointing else sum(rows)
    moved = max((2 * s.volume for s in spreads), default=0.0)
    gathered = max((s.parallel.weight_group * s.weight_bytes for s in spreads), default=0.0)
    casts = (dense + experts) * at.narrow if at.narrow != at.wide else 0.0
    if tactics.checkpointing:
        casts /= max(1, sum(config.depths))
    unsharded = at.wide * 2 * dense / max(1, sum(config.depths)) if tactics.fsdp else 0.0
    return Memory(
        dense=at.wide * dense / shards,
        experts=at.wide * experts,
        gradients=at.wide * (dense / shards + trained_experts),
        moments=at.wide * (2 + averaged) * (dense / halves + trained_experts / expert_halves),
        activations=kept,
        dispatch=kept_rows + (max(rows, default=0.0) if tactics.checkpointing else 0.0) + moved + gathered,
        transient=running + casts + unsharded,
    )


@dataclass(frozen=True)
class _Block:
    """Bytes of one image in a dense block."""

    kept: float
    """Without the MLP."""
    mlp: float
    weights: float
    """Attention weights alone."""
    input: float


def _block(config: ModelConfig, stage: int, at: Setting, tactics: Tactics) -> _Block:
    style, grid = resolve_style(config.style), stage_grids(config)[stage]
    dim, heads = config.embed_dim * 2**stage, config.num_heads[stage]
    wide, narrow = prod(grid.size) * dim * at.wide, prod(grid.padded) * dim * at.narrow
    once = prod(grid.size) * dim * at.narrow
    weights = prod(grid.padded) * grid.area * heads * at.narrow
    in_turns = stage < tactics.sequential_stages
    # The norm's input, what enters the projections; queries, keys and values as the products meet them; drop path's
    # factor needs each branch's result.
    cosine = style.similarity == "cosine"
    queries = (6 if cosine else 4) * narrow
    kept = wide + narrow + queries + once + (once if config.drop_path_rate else 0)
    if not (at.fused_attention or in_turns):
        kept += weights
    if style.norm == "res-post":
        kept += wide  # both norms' inputs are results of their own
    hidden = int(dim * config.mlp_ratio)
    mlp = wide + once + 2 * prod(grid.size) * hidden * at.narrow + (once if config.drop_path_rate else 0)
    return _Block(kept, mlp, weights, wide)


def _rows_kept(spread: Spread) -> float:
    """Bytes that an expert layer keeps: rows as they enter, both sides of the activation, rows as they leave."""
    layer, at = spread.layer, spread.at
    here, met = spread.rows * layer.dim * at.narrow, spread.rows_computed * at.narrow
    parts = spread.slices // min(spread.parallel.weight_group, spread.slices)
    inside = met * (layer.dim + (layer.fc1_rows + layer.hidden) / parts)
    table = at.images * layer.tokens * (5 * layer.num_experts * at.wide + 6 * layer.top_k * 8)
    return inside + here + table


def _activations(
    config: ModelConfig, spreads: list[Spread], blocks: list[_Block], at: Setting, tactics: Tactics
) -> tuple[float, float]:
    """(kept, needed by the block that runs) bytes of the whole micro-batch, expert rows apart."""
    sparse = {(s.layer.stage, s.layer.block) for s in spreads}
    kept = running = 0.0
    for stage, (block, depth) in enumerate(zip(blocks, config.depths, strict=True)):
        whole = block.kept + block.mlp
        running = max(running, (whole if tactics.checkpointing else 0.0) + 2 * block.weights * (not at.fused_attention))
        for index in range(depth):
            if tactics.checkpointing:
                kept += block.input * (2 if (stage, index) in sparse else 1)
            else:
                # of an expert layer's branch: the norm's input, the router's, and drop path's
                kept += block.kept + (2 * block.input if (stage, index) in sparse else block.mlp)
        if stage + 1 < len(blocks):
            kept += 2 * block.input  # merging: what was brought together, normed
    grids = stage_grids(config)
    pixels = config.in_chans * prod(config.img_size) * at.wide
    kept += pixels + 2 * prod(grids[0].size) * config.embed_dim * at.wide
    kept += 2 * blocks[-1].input + 2 * config.num_classes * at.wide
    return at.images * kept, at.images * running
