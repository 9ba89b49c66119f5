"""What one rank computes for a micro-batch, part by part, from a model's config alone.

Legend: b images on this rank; P tokens of the padded map, T of the map itself; N of a window; D width, F hidden width,
h heads, d = D/h; S = P·N·h attention weights of an image; E experts, K choices; w bytes of an element on the main
branch, p in products (half of that under autocast).

Products are exact, equal to torch's own count. Traffic follows the operators one by one: what each reads and writes,
as if nothing stayed in a cache. Backward passes of elementwise operators read the gradient besides. Experts' own work
(`ExpertLayer`) is kept apart: how many rows meet how many experts depends on how they are spread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from swinmoe.config import ModelConfig, MoEConfig, StyleConfig, resolve_style
from swinmoe.config.model import moe_layer_name
from swinmoe.models.counts import CPB_HIDDEN, stage_grids
from swinmoe.models.position import num_offsets
from swinmoe.models.windows import WindowGrid
from swinmoe.profiling.plan.cost import Cost, backward_of, product
from swinmoe.profiling.plan.hardware import WIDTH


@dataclass(frozen=True)
class Part:
    """One component's work for a micro-batch on one rank."""

    name: str
    """`embed`, `attention`, `position_bias`, `mlp`, `router`, `merge` or `head`."""
    stage: int
    forward: Cost
    backward: Cost


@dataclass(frozen=True)
class ExpertLayer:
    """An expert layer, before it is known how its experts are spread."""

    stage: int
    block: int
    tokens: int
    """Of one image."""
    dim: int
    hidden: int
    num_experts: int
    top_k: int
    fc1_rows: int
    """Rows of an expert's first matrix: F, or 2F (SwiGLU)."""
    biases: int
    """Numbers in an expert's biases."""

    @property
    def name(self) -> str:
        """As the model's configuration and its records name it."""
        return moe_layer_name(self.stage, self.block)

    @property
    def expert_params(self) -> int:
        """Numbers in one expert, whole."""
        return self.dim * (self.fc1_rows + self.hidden) + self.biases


@dataclass(frozen=True)
class Setting:
    """What the same work costs depends on these."""

    images: int
    """b."""
    precision: str = "fp32"
    fused_attention: bool = False
    experts_in_blocks: bool = False
    """Expert layers work piece by piece, and what they do with a piece finds it in the cache: on a CPU."""
    experts_in_kernel: bool = False
    """Of these, experts take our kernel in C++: hidden units do not leave the cache, and are not kept."""

    @property
    def wide(self) -> int:
        """w."""
        return 8 if self.precision == "fp64" else 4

    @property
    def narrow(self) -> int:
        """p."""
        return WIDTH[self.precision]


def scaled_hidden(hidden: int, ratio: float) -> int:
    """Hidden width of an expert, as `MoEMlp` rounds it."""
    return max(1, round(hidden * ratio))


def expert_layers(config: ModelConfig) -> list[ExpertLayer]:
    """The model's expert layers in order; none if it is dense."""
    moe = config.moe
    if moe is None:
        return []
    layers = []
    for stage, (grid, blocks) in enumerate(zip(stage_grids(config), config.moe_blocks, strict=True)):
        dim = config.embed_dim * 2**stage
        hidden = scaled_hidden(int(dim * config.mlp_ratio), moe.experts.hidden_ratio or 1.0)
        fc1_rows = 2 * hidden if moe.experts.type == "swiglu" else hidden
        biases = (fc1_rows if moe.experts.fc1_bias else 0) + (dim if moe.experts.fc2_bias != "none" else 0)
        for block in blocks:
            layers.append(
                ExpertLayer(stage, block, prod(grid.size), dim, hidden, moe.num_experts, moe.top_k, fc1_rows, biases)
            )
    return layers


def parts(config: ModelConfig, at: Setting) -> Iterator[Part]:
    """Everything but experts and what carries rows to them, in the order of the forward pass."""
    style = resolve_style(config.style)
    grids = stage_grids(config)
    yield _embed(config, prod(grids[0].size), at)
    for stage, (grid, depth) in enumerate(zip(grids, config.depths, strict=True)):
        dim, heads, tokens = config.embed_dim * 2**stage, config.num_heads[stage], prod(grid.size)
        sparse = config.moe_blocks[stage] if config.moe is not None and config.moe_blocks else ()
        dropped = config.drop_path_rate > 0
        for block in range(depth):
            shifted = block % 2 == 1 and any(w < s for w, s in zip(grid.window, grid.size, strict=True))
            yield _position_bias(style, grid, heads, stage, shifted, at)
            yield _attention(style, grid, dim, heads, stage, shifted, dropped, at)
            if config.moe is not None and block in sparse:
                yield _router(config.moe, tokens, dim, stage, at)
                yield _branch_end(tokens, dim, stage, dropped, at)
                if config.moe.shared_expert_ratio:
                    hidden = scaled_hidden(int(dim * config.mlp_ratio), config.moe.shared_expert_ratio)
                    swiglu = config.moe.experts.type == "swiglu"
                    yield _mlp("shared", tokens, dim, hidden, stage, at, swiglu=swiglu)
            else:
                yield _mlp("mlp", tokens, dim, int(dim * config.mlp_ratio), stage, at)
                yield _branch_end(tokens, dim, stage, dropped, at)
        if stage + 1 < len(grids):
            yield _merge(grid, dim, stage, at)
    yield _head(config, grids[-1], at)


def _stream(kind: str, size: float, forward: float, backward: float, calls: float = 1) -> tuple[Cost, Cost]:
    """An elementwise operator over `size` bytes that moves so many times that, forward and backward."""
    return (
        Cost(**{kind: size * forward, "calls": calls}),
        Cost(**{kind: size * backward, "calls": calls if backward else 0}),
    )


def _sum(name: str, stage: int, *pairs: tuple[Cost, Cost]) -> Part:
    return Part(name, stage, sum((f for f, _ in pairs), Cost()), sum((b for _, b in pairs), Cost()))


def linear(
    tokens: float, inputs: int, outputs: int, at: Setting, *, biased: bool = True, leaf: bool = False
) -> tuple[Cost, Cost]:
    """A linear layer with a weight of its own: products, cast of the weight, gradients added to what is there."""
    size = inputs * outputs
    forward = product(tokens, outputs, inputs, at.narrow)
    backward = backward_of(tokens, outputs, inputs, at.narrow, leaf=leaf)
    if at.narrow != at.wide:
        cast = (at.wide + at.narrow) * size
        forward, backward = forward + Cost(copy=cast, calls=1), backward + Cost(copy=cast, calls=1)
    backward += Cost(copy=3 * at.wide * size + (at.narrow * tokens * outputs if biased else 0), calls=1 + biased)
    return forward, backward


def _cast(rows: float, width: int, at: Setting) -> list[tuple[Cost, Cost]]:
    """Rows between the main branch and a product, under autocast."""
    return [_stream("copy", rows * width * (at.wide + at.narrow), 1, 1)] if at.narrow != at.wide else []


def _embed(config: ModelConfig, tokens: int, at: Setting) -> Part:
    dim, pixels = config.embed_dim, config.in_chans * prod(config.patch_size)
    rows = at.images * tokens
    pairs = [
        linear(rows, pixels, dim, at, leaf=True),
        _stream("copy", rows * pixels * at.narrow, 2, 0),  # patches brought together
    ]
    if config.patch_norm:
        pairs.append(_stream("norm", rows * dim * at.wide, 2, 3))
    if config.absolute_pos_embed:
        pairs.append(_stream("copy", rows * dim * at.wide, 3, 1))
    return _sum("embed", 0, *pairs)


def _position_bias(style: StyleConfig, grid: WindowGrid, heads: int, stage: int, shifted: bool, at: Setting) -> Part:
    """Once for a micro-batch: table or network, gathered for every pair of a window, repeated where masks differ."""
    offsets, pairs_of_window = num_offsets(grid.window), heads * grid.area**2
    pairs = [_stream("copy", pairs_of_window * at.wide, 2, 2)]
    if shifted or any(grid.padding):
        pairs.append(_stream("copy", grid.num_windows * pairs_of_window * at.wide, 2, 2))
    if style.position_bias != "table":
        pairs.append(linear(offsets, 2, CPB_HIDDEN, at, leaf=True))
        pairs.append(_stream("activation", offsets * CPB_HIDDEN * at.narrow, 2, 3))
        pairs.append(linear(offsets, CPB_HIDDEN, heads, at, biased=False))
    return _sum("position_bias", stage, *pairs)


def _attention(
    style: StyleConfig, grid: WindowGrid, dim: int, heads: int, stage: int, shifted: bool, dropped: bool, at: Setting
) -> Part:
    padded, tokens = at.images * prod(grid.padded), at.images * prod(grid.size)
    area, cosine = grid.area, style.similarity == "cosine"
    scores = padded * heads * area * at.narrow  # bytes of S
    narrow, wide = padded * dim * at.narrow, tokens * dim * at.wide
    pairs = [
        _stream("norm", wide, 2, 3),
        linear(padded, dim, 3 * dim, at),
        _stream("copy", narrow, 6, 6),  # heads split and windows cut, in one copy
        _stream("norm", 2 * narrow, 3, 5, calls=4) if cosine else _stream("copy", narrow, 2, 2),
    ]
    if shifted or any(grid.padding):
        pairs += [_stream("copy", wide, 2, 2), _stream("copy", narrow, 2, 2)]
    windows, per_head = padded // area * heads, dim // heads
    forward = product(area, area, per_head, at.narrow, batch=windows)
    forward += product(area, per_head, area, at.narrow, batch=windows)
    backward = forward * 2
    if at.fused_attention:
        # Weights stay on the chip: queries, keys, values and results are what moves; weights are computed again
        pairs.append(
            (
                Cost(flops=forward.flops, products=4 * narrow, calls=1),
                Cost(flops=2.5 * forward.flops, products=8 * narrow, calls=1),
            )
        )
    else:
        # the bias is as wide as the main branch, and so are scores from there on
        widened = scores / at.narrow * at.wide
        pairs += [(forward, backward), _stream("softmax", widened, 2, 3)]
        pairs.append((Cost(copy=scores + widened, calls=1), Cost(copy=widened, calls=1)))
        pairs += _cast(padded * heads, area, at)
    pairs += [_stream("copy", narrow, 2, 2), linear(tokens, dim, dim, at), _stream("copy", wide, 3, 2 + dropped)]
    pairs += _cast(padded, dim, at) + _cast(tokens, dim, at)
    return _sum("attention", stage, *pairs)


def _mlp(name: str, tokens: int, dim: int, hidden: int, stage: int, at: Setting, *, swiglu: bool = False) -> Part:
    rows = at.images * tokens
    first = 2 * hidden if swiglu else hidden
    return _sum(
        name,
        stage,
        linear(rows, dim, first, at),
        _stream("activation", rows * first * at.narrow, 2, 3),
        linear(rows, hidden, dim, at),
        *_cast(rows, dim, at),
    )


def _branch_end(tokens: int, dim: int, stage: int, dropped: bool, at: Setting) -> Part:
    """The norm of the MLP's branch, and its sum with the main branch."""
    size = at.images * tokens * dim * at.wide
    return _sum("mlp", stage, _stream("norm", size, 2, 3), _stream("copy", size, 3, 2 + dropped))


def _router(moe: MoEConfig, tokens: int, dim: int, stage: int, at: Setting) -> Part:
    """Scores in float32, noise, choice, queues, statistics and losses."""
    rows, experts, wide = at.images * tokens, moe.num_experts, at.wide
    exact = Setting(at.images, "fp64" if at.precision == "fp64" else "fp32") if moe.router.fp32 else at
    if moe.router.type == "cosine":
        scores = [
            linear(rows, dim, moe.router.proj_dim, exact),
            _stream("norm", rows * moe.router.proj_dim * wide, 3, 5),
            linear(rows, moe.router.proj_dim, experts, exact, biased=False),
        ]
    else:
        scores = [linear(rows, dim, experts, exact, biased=False)]
    noise = 3 if moe.router.noise else 0
    # softmax, choice, entropy and the sums of losses go over (T, E); queues over (T, K) indices, some ten times
    table = _stream("route", rows * experts * wide, 10 + noise, 6, calls=20)
    queues = _stream("route", rows * moe.top_k * 8, 12, 2, calls=20)
    return _sum("router", stage, *scores, table, queues)


def _merge(grid: WindowGrid, dim: int, stage: int, at: Setting) -> Part:
    quarter = at.images * prod(-(-side // 2) for side in grid.size)
    size = 4 * quarter * dim * at.wide
    pairs = (
        _stream("copy", size, 2, 2),
        _stream("norm", size, 2, 3),
        linear(quarter, 4 * dim, 2 * dim, at, biased=False),
    )
    return _sum("merge", stage, *pairs)


def _head(config: ModelConfig, grid: WindowGrid, at: Setting) -> Part:
    dim = config.embed_dim * 2 ** (len(config.depths) - 1)
    rows = at.images * prod(grid.size)
    pairs = [_stream("norm", rows * dim * at.wide, 2, 3), _stream("copy", rows * dim * at.wide, 1, 1)]
    if config.num_classes:
        pairs.append(linear(at.images, dim, config.num_classes, at))
        pairs.append(_stream("softmax", at.images * config.num_classes * at.wide, 4, 4, calls=4))
    return _sum("head", len(config.depths) - 1, *pairs)
