"""Parameters and FLOPs of a model in closed form, from its config alone: no module is built.

Two conventions, never mixed:

- `flops`: the matrix products of one forward pass, 2 per multiply-add, equal to torch's `FlopCounterMode` on the built
  model with explicit attention. Everything elementwise (norms, softmax, GELU, gathering rows) is free, as there.
  Experts are counted for what tokens ask of them; padded layouts compute empty slots besides. The counter itself sees
  no grouped products (`grouped_mm` on GPUs) and counts nothing for them.
- `table_flops`: what the papers print, equal to the `flops()` methods of microsoft/Swin-Transformer: 1 per
  multiply-add, norms counted, position-bias networks and routers not, experts times their capacity factor.

Legend: H, W map size; T = H·W tokens; N tokens of a window; D width; F hidden width; h heads; E experts; K choices per
token; P width of a cosine router's space.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod

from torch import nn

from swinmoe.config import CapacityPolicy, ModelConfig, MoEConfig, StyleConfig, resolve_style
from swinmoe.config.model import moe_layer_name
from swinmoe.models.position import num_offsets
from swinmoe.models.windows import Pair, WindowGrid, fit_window
from swinmoe.moe.registry import EXPERTS, ROUTERS

CPB_HIDDEN = 512
"""Hidden width of the log-CPB network (V2 §3.3)."""


@dataclass(frozen=True)
class PartCounts:
    """One kind of component, summed over the model."""

    params: int = 0
    """Elements of all its parameters."""
    active: int = 0
    """Of these, the parameters that take part in computing one token."""
    flops: int = 0
    """Of one image's forward pass, 2 per multiply-add."""
    table_flops: float = 0.0
    """The papers' convention, 1 per multiply-add."""
    frozen: int = 0
    """Parameters that no training moves (the frozen-zero biases of Swin-MoE's experts)."""
    leaf_flops: int = 0
    """Of `flops`, products with something that needs no gradient (pixels, coordinates): their backward costs half."""

    def __add__(self, other: PartCounts) -> PartCounts:
        return PartCounts(
            params=self.params + other.params,
            active=self.active + other.active,
            flops=self.flops + other.flops,
            table_flops=self.table_flops + other.table_flops,
            frozen=self.frozen + other.frozen,
            leaf_flops=self.leaf_flops + other.leaf_flops,
        )


@dataclass(frozen=True)
class ModelCounts:
    """Sizes and costs of one model at its config's image size."""

    total: int
    """Parameters, `sum(p.numel())` of the built model, with frozen ones."""
    active: int
    """Parameters that one token meets: everything but the E - K experts it does not visit; routers and shared in."""
    trainable: int
    """`total` without frozen parameters: what Microsoft's scripts print."""
    flops: int
    """Forward pass of one image alone, 2 per multiply-add, every choice of every token computed (dropless)."""
    table_flops: float
    """The papers' figure: multiply-adds of one image; fixed capacity counts its slots, filled or not."""
    train_flops: int
    """Forward and backward of one more image in a batch, 2 per multiply-add, without recomputation. Three times the
    forward, less the gradient by pixels, which nobody needs; what a batch pays once is in `batch_train_flops`."""
    batch_flops: int
    """Of `flops`, what a batch pays once however large it is: the position-bias networks."""
    batch_train_flops: int
    """The same, forward and backward."""
    by_part: dict[str, PartCounts] = field(default_factory=dict)
    """Patch embedding, attention, position bias, MLPs, routers, experts, merging, norms, head; sums to the totals."""

    def step_flops(self, images: int, micro_batches: int = 1) -> int:
        """Exact forward and backward cost of an optimiser step over `images`, split into `micro_batches`."""
        return images * self.train_flops + micro_batches * self.batch_train_flops


def stage_grids(config: ModelConfig) -> list[WindowGrid]:
    """Map and window of each stage at `config.img_size`; images that fill no patch and odd maps are padded."""
    size = _ceil_div(config.img_size, config.patch_size)
    square = config.window_size[0] == config.window_size[1]
    grids = []
    for _ in config.depths:
        window = fit_window(size, config.window_size, square=square, small_map=config.small_map)
        grids.append(WindowGrid(size, window, (0, 0)))
        size = _ceil_div(size, (2, 2))
    return grids


def expert_row_flops(config: ModelConfig) -> dict[str, int]:
    """Forward FLOPs of one token in one chosen expert of each expert layer, by the layer's name; shared experts are
    not among them."""
    costs = {}
    for stage, blocks in enumerate(config.moe_blocks if config.moe is not None else ()):
        dim = config.embed_dim * 2**stage
        for block in blocks:
            assert config.moe is not None
            expert = _expert(config.moe, 1, dim, _expert_hidden(config.moe, int(dim * config.mlp_ratio)))
            costs[moe_layer_name(stage, block)] = expert.flops
    return costs


def _ceil_div(size: Pair, by: Pair) -> Pair:
    return -(-size[0] // by[0]), -(-size[1] // by[1])


def count(config: ModelConfig) -> ModelCounts:
    """Parameters and FLOPs of the model that `config` describes.

    Routers and experts registered from outside are built on the meta device, and each of their matrices is taken to
    meet each token once.

    Raises:
        ConfigError: an unknown router or expert.
    """
    parts: dict[str, PartCounts] = {}
    for name, part in _parts(config):
        parts[name] = parts.get(name, PartCounts()) + part
    whole = sum(parts.values(), PartCounts())
    shared = parts.get("position_bias", PartCounts())
    return ModelCounts(
        total=whole.params,
        active=whole.active,
        trainable=whole.params - whole.frozen,
        flops=whole.flops,
        table_flops=whole.table_flops,
        train_flops=_train_flops(whole) - _train_flops(shared),
        batch_flops=shared.flops,
        batch_train_flops=_train_flops(shared),
        by_part=parts,
    )


def _train_flops(part: PartCounts) -> int:
    """Backward multiplies twice per forward product, once for each factor; a leaf without gradient saves one."""
    return 3 * part.flops - part.leaf_flops


def _dense(params: int, flops: int = 0, table: float = 0.0, *, leaf: int = 0) -> PartCounts:
    """A part whose every parameter meets every token."""
    return PartCounts(params, params, flops, table, leaf_flops=leaf)


def _parts(config: ModelConfig) -> Iterator[tuple[str, PartCounts]]:
    """(kind, counts) of every component, one by one."""
    style = resolve_style(config.style)
    grids = stage_grids(config)
    yield from _embedding(config, prod(grids[0].size))
    for stage, (grid, depth) in enumerate(zip(grids, config.depths, strict=True)):
        dim, tokens = config.embed_dim * 2**stage, prod(grid.size)
        sparse = config.moe_blocks[stage] if config.moe is not None and config.moe_blocks else ()
        for block in range(depth):
            yield from _attention(config, style, grid, dim, config.num_heads[stage])
            yield "norms", _dense(2 * 2 * dim, table=2 * dim * tokens)
            if config.extra_norm_every and (block + 1) % config.extra_norm_every == 0:
                yield "norms", _dense(2 * dim, table=dim * tokens)
            if config.moe is not None and block in sparse:
                policy = config.moe.capacity.of(moe_layer_name(stage, block)).eval
                yield from _moe(config.moe, policy, tokens, dim, int(dim * config.mlp_ratio))
            else:
                yield "mlp", _mlp(tokens, dim, int(dim * config.mlp_ratio), fc2_bias=config.mlp_fc2_bias)
        if stage + 1 < len(grids):
            yield from _merging(style, grid, dim)
    dim = config.embed_dim * 2 ** (len(grids) - 1)
    # Microsoft's methods count the last norm on the first map divided by 2^stages; kept, so that digits agree
    yield "norms", _dense(2 * dim, table=dim * prod(grids[0].size) // 2 ** len(grids))
    if config.num_classes:
        products = dim * config.num_classes
        yield "head", _dense(products + config.num_classes, 2 * products, products)


def _embedding(config: ModelConfig, tokens: int) -> Iterator[tuple[str, PartCounts]]:
    dim = config.embed_dim
    matrix = dim * config.in_chans * prod(config.patch_size)
    products = matrix * tokens
    yield "patch_embed", _dense(matrix + dim, 2 * products, products, leaf=2 * products)
    if config.patch_norm:
        yield "norms", _dense(2 * dim, table=dim * tokens)
    if config.absolute_pos_embed:
        yield "patch_embed", _dense(tokens * dim)


def _attention(
    config: ModelConfig, style: StyleConfig, grid: WindowGrid, dim: int, heads: int
) -> Iterator[tuple[str, PartCounts]]:
    # qkv 3D², scores and weighted values 2·N·D for each token of the padded map; the output projection for the others
    products = prod(grid.padded) * (3 * dim * dim + 2 * grid.area * dim) + prod(grid.size) * dim * dim
    # cosine similarity has no key bias (V2's code) and a learned scale per head
    cosine = style.similarity == "cosine"
    qkv_bias = (2 if cosine else 3) * dim if config.qkv_bias else 0
    params = 4 * dim * dim + qkv_bias + dim + (heads if cosine else 0)
    yield "attention", _dense(params, 2 * products, products)
    offsets = num_offsets(grid.window)
    if style.position_bias == "table":
        yield "position_bias", _dense(offsets * heads)
    else:
        first, second = 2 * CPB_HIDDEN, CPB_HIDDEN * heads
        cost = 2 * offsets * (first + second)
        yield "position_bias", _dense(first + CPB_HIDDEN + second, cost, leaf=2 * offsets * first)


def _merging(style: StyleConfig, grid: WindowGrid, dim: int) -> Iterator[tuple[str, PartCounts]]:
    tokens = prod(grid.size)
    products = prod(_ceil_div(grid.size, (2, 2))) * 4 * dim * 2 * dim
    yield "merging", _dense(8 * dim * dim, 2 * products, products)
    if style.merge_norm == "before":
        yield "norms", _dense(2 * 4 * dim, table=tokens * dim)
    else:
        yield "norms", _dense(2 * 2 * dim, table=tokens * dim // 2)


def _mlp(
    tokens: int, dim: int, hidden: int, *, fc2_bias: bool, fc1_bias: bool = True, swiglu: bool = False
) -> PartCounts:
    """One two-layer MLP, GELU or SwiGLU (whose first matrix is twice as tall), visited by every token."""
    matrices = (3 if swiglu else 2) * dim * hidden
    biases = ((2 if swiglu else 1) * hidden if fc1_bias else 0) + (dim if fc2_bias else 0)
    return _dense(matrices + biases, 2 * matrices * tokens, matrices * tokens)


def _moe(
    moe: MoEConfig, policy: CapacityPolicy, tokens: int, dim: int, hidden: int
) -> Iterator[tuple[str, PartCounts]]:
    yield "router", _router(moe, tokens, dim)
    expert = _expert(moe, tokens, dim, _expert_hidden(moe, hidden))
    chosen = moe.top_k
    everyone = PartCounts(
        params=moe.num_experts * expert.params,
        active=chosen * expert.params,
        flops=chosen * expert.flops,
        table_flops=chosen * _slots_per_choice(policy) * expert.table_flops,
        frozen=moe.num_experts * expert.frozen,
    )
    yield "experts", everyone
    if moe.shared_expert_ratio:
        yield "experts", _expert(moe, tokens, dim, _scaled(hidden, moe.shared_expert_ratio))


def _expert_hidden(moe: MoEConfig, hidden: int) -> int:
    """Hidden width of a chosen expert, where a dense MLP has `hidden`."""
    return _scaled(hidden, moe.experts.hidden_ratio or 1.0)


def _scaled(hidden: int, ratio: float) -> int:
    """Hidden width of an expert, as `MoEMlp` rounds it."""
    return max(1, round(hidden * ratio))


def _expert(moe: MoEConfig, tokens: int, dim: int, hidden: int) -> PartCounts:
    """One expert that every token visits."""
    cfg = moe.experts
    if cfg.type in ("gelu", "relu", "swiglu"):
        swiglu = cfg.type == "swiglu"
        part = _mlp(tokens, dim, hidden, fc1_bias=cfg.fc1_bias, fc2_bias=cfg.fc2_bias != "none", swiglu=swiglu)
        return replace(part, frozen=dim if cfg.fc2_bias == "frozen-zero" else 0)
    make = EXPERTS.get(cfg.type)
    part = make(cfg, num_experts=1, dim=dim, hidden=hidden, name="", seed=0, init_std=0.0, device="meta")
    return _from_outside(part, tokens, matrix_axes=3)


def _router(moe: MoEConfig, tokens: int, dim: int) -> PartCounts:
    """Linear: D·E. Cosine: projection to P with bias, similarity P·E, one temperature. The papers count neither."""
    experts, proj = moe.num_experts, moe.router.proj_dim
    if moe.router.type == "linear":
        return _dense(dim * experts, 2 * tokens * dim * experts)
    if moe.router.type == "cosine":
        matrices = dim * proj + proj * experts
        return _dense(matrices + proj + 1, 2 * tokens * matrices)
    part = ROUTERS.get(moe.router.type)(moe, dim, name="", seed=0, init_std=0.0, device="meta")
    return replace(_from_outside(part, tokens, matrix_axes=2), table_flops=0.0)


def _from_outside(part: nn.Module, tokens: int, *, matrix_axes: int) -> PartCounts:
    """A registered part of which no closed form is known: each of its matrices is taken to meet each token once.

    Stacked matrices of experts have three axes, so their biases have two.
    """
    parameters = list(part.parameters())
    matrices = sum(p.numel() for p in parameters if p.ndim >= matrix_axes)
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    counted = _dense(sum(p.numel() for p in parameters), 2 * matrices * tokens, matrices * tokens)
    return replace(counted, frozen=frozen)


def _slots_per_choice(policy: CapacityPolicy) -> float:
    """Slots computed for each choice: fixed capacity computes them filled or not, the others only what is routed."""
    return policy.factor if policy.kind == "fixed" else 1.0
