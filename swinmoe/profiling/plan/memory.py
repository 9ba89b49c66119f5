"""Bytes of one rank, class by class: parameters, gradients, Adam's moments, activations, dispatch buffers.

Legend as in `work`: b images, P and T tokens of padded map and map, D width, F hidden width, S attention weights of an
image, N rows of an expert layer; w and p bytes of an element on the main branch and in products.

Parameters, gradients and moments are exact, under ZeRO and FSDP2 too. Activations are what autograd keeps for the
backward pass, tensor by tensor of the operators as they are written; what an operator needs only while it runs is in
`transient`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

from swinmoe.config import ModelConfig, RunConfig, resolve_style
from swinmoe.models.counts import CPB_HIDDEN, count, stage_grids
from swinmoe.models.position import num_offsets
from swinmoe.profiling.plan.spread import Spread
from swinmoe.profiling.plan.tensors import largest_unit, shares_of, units_of
from swinmoe.profiling.plan.work import Setting


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


def plan_memory(run: RunConfig, spreads: list[Spread], at: Setting, world: int, rank: int | None = None) -> Memory:
    """What one rank needs at the end of a micro-batch's forward pass, when most is alive.

    Args:
        run: model, and what is done to need less: `model.grad_checkpointing`, `model.attention_chunks`,
            `train.offload_activations`, `parallel.zero`, `parallel.shard_dense`.
        spreads: of its expert layers, in order.
        at: micro-batch and precision.
        world: ranks.
        rank: whose; None = one that has most of each class.
    """
    config, parallel = run.model, run.parallel
    dense, experts, _ = params_here(config, spreads)
    shares = shares_of(run, spreads, world, rank)
    kept, rows = kept_for_backward(config, spreads, at)
    if run.train.offload_activations:
        kept = rows = 0.0
    moved = max((2 * s.volume for s in spreads), default=0.0)
    per_block = max(1, sum(config.depths))
    casts = (dense + experts) * at.narrow if at.narrow != at.wide else 0.0
    if config.recomputes_all:
        casts /= per_block
    unsharded = 0.0
    if parallel.shard_dense and world > 1:
        # a unit whole, and the next one on its way; gradients whole too until the last micro-batch has added to them
        unsharded = 2.0 * largest_unit(run, spreads)
        if run.train.accumulation > 1:
            unsharded += sum(t.size for unit in units_of(run, spreads) for t in unit if t.group is not None)
    copies = 2 + (run.train.ema_decay is not None)
    return Memory(
        dense=at.wide * shares.dense,
        experts=at.wide * shares.experts,
        gradients=at.wide * shares.gradients,
        moments=at.wide * copies * shares.moments,
        activations=kept,
        dispatch=rows + moved,
        transient=_running(config, spreads, at) + casts + at.wide * unsharded,
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
    bias: tuple[float, float]
    """Of the position bias of an unshifted and of a shifted block, whatever the number of images."""


def _block(config: ModelConfig, stage: int, at: Setting) -> _Block:
    style, grid = resolve_style(config.style), stage_grids(config)[stage]
    dim, heads = config.embed_dim * 2**stage, config.num_heads[stage]
    wide, narrow = prod(grid.size) * dim * at.wide, prod(grid.padded) * dim * at.narrow
    once = prod(grid.size) * dim * at.narrow
    weights = prod(grid.padded) * grid.area * heads * at.narrow
    in_turns = config.chunks_of(stage) > 1
    # The norm's input, what enters the projections; queries, keys and values as the products meet them; drop path's
    # factor needs each branch's result.
    cosine = style.similarity == "cosine"
    # In turns, only what they are made of
    queries = (3 if in_turns else 6 if cosine else 4) * narrow
    # Each dropout keeps its mask; that of attention weights besides what it made of them, which a product needs.
    drops, path = config.drop_rate > 0, config.drop_path_rate > 0
    kept = wide + narrow + queries + once * (1 + path + drops)
    if not (at.fused_attention or in_turns):
        kept += weights * (3 if config.attn_drop_rate else 1)
    hidden = prod(grid.size) * int(dim * config.mlp_ratio) * at.narrow
    mlp = wide + once * (1 + path + drops) + hidden * (2 + drops)
    table = heads * grid.area**2 * at.wide
    masked = table * (1 + grid.num_windows)
    network = 0.0 if style.position_bias == "table" else num_offsets(grid.window) * (CPB_HIDDEN + heads) * at.narrow
    shifts = any(w < s for w, s in zip(grid.window, grid.size, strict=True))
    plain = masked if any(grid.padding) else table
    return _Block(kept, mlp, weights, wide, (network + plain, network + (masked if shifts else plain)))


def _rows_kept(spread: Spread) -> float:
    """Bytes that an expert layer keeps: rows as they enter, both sides of the activation and its dropout's mask (our
    kernel: what enters them), rows as they leave; gathered weights."""
    layer, at = spread.layer, spread.at
    here, met = spread.rows * layer.dim * at.narrow, spread.rows_computed * at.narrow
    parts = spread.slices // min(spread.parallel.weight_group, spread.slices)
    after = 0 if at.experts_in_kernel else layer.hidden * (1 + (spread.moe.experts.dropout > 0))
    inside = met * (layer.dim + (layer.fc1_rows + after) / parts)
    return inside + here + spread.parallel.weight_group * spread.weight_bytes


def _decisions(spread: Spread) -> float:
    """Bytes of scores and queues, which are never computed again; each loss keeps tables of its own."""
    layer, at, losses = spread.layer, spread.at, spread.moe.losses
    tables = 1 + 4 * losses.needs_noise + (losses.importance > 0) + (losses.z > 0)
    return at.images * layer.tokens * (tables * layer.num_experts * at.wide + 3 * layer.top_k * 8)


def kept_for_backward(config: ModelConfig, spreads: list[Spread], at: Setting) -> tuple[float, float]:
    """(activations, rows of expert layers): bytes that autograd keeps at the end of a micro-batch's forward pass."""
    sparse = {(s.layer.stage, s.layer.block) for s in spreads}
    pre_norm = resolve_style(config.style).norm == "pre"
    kept = shared = 0.0
    for stage, depth in enumerate(config.depths):
        block, recomputed = _block(config, stage, at), config.recomputes(stage)
        for index in range(depth):
            if recomputed:
                # Routing lies between two regions: what enters each, and the normed tokens where they are another
                regions = 3 if pre_norm else 2
                kept += block.input * (regions if (stage, index) in sparse else 1)
            else:
                shared += block.bias[index % 2]
                # of an expert layer's branch: the norm's input, the router's, and drop path's
                kept += block.kept + (2 * block.input if (stage, index) in sparse else block.mlp)
        if stage + 1 < len(config.depths):
            # merging: what was brought together, and that normed, or its projection to half the size
            kept += block.input * (2 if resolve_style(config.style).merge_norm == "before" else 1.5)
    kept += config.in_chans * prod(config.img_size) * at.wide
    embedded = prod(stage_grids(config)[0].size) * config.embed_dim * at.wide
    kept += embedded * (config.patch_norm + (config.drop_rate > 0))
    kept += block.input + 2 * config.num_classes * at.wide
    rows = sum(_decisions(s) + (0.0 if s.recomputed else _rows_kept(s)) for s in spreads)
    return at.images * kept + shared, rows


def _running(config: ModelConfig, spreads: list[Spread], at: Setting) -> float:
    """Bytes that the largest block needs besides: two copies of attention weights, and what it computes again."""
    needed = 0.0
    for stage in range(len(config.depths)):
        block = _block(config, stage, at)
        again = block.kept + block.mlp if config.recomputes(stage) else 0.0
        weights = 2 * block.weights / config.chunks_of(stage)
        needed = max(needed, again + weights * (not at.fused_attention))
    rows = max((_rows_kept(s) for s in spreads if s.recomputed), default=0.0)
    return at.images * needed + rows
