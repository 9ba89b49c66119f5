"""Two-layer MLPs, one per expert, over rows grouped by expert: the arithmetic under every `ExpertFn`.

Shapes: N rows ordered (source, local expert), S sources, e experts here, D width, F hidden width (any slice of it),
A = rows_per_hidden·F rows of fc1.

Four ways to the same numbers:
- kernel: ours in C++ (`expert_kernel`), for float32 on a CPU with a compiler;
- blocks: an autograd Function of our own, for everything else on a CPU. It keeps what a dense MLP keeps, and adds
  weight gradients to their final place. With many experts, weights are most of the memory traffic, and a gradient that
  is first written to a fresh stack and then added to `.grad` costs several times that of one that the matrix product
  itself accumulates;
- grouped: `torch.nn.functional.grouped_mm`, for bfloat16 on GPUs that have the kernel;
- plain: one `linear` per expert in ordinary autograd, for everything else.
The paths for GPUs were never run on one: `grouped` is tested on CPU, where the operator exists too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from swinmoe.moe.activations import Activation
from swinmoe.moe.expert_kernel import kernel_mlp, takes
from swinmoe.moe.precision import autocast_dtype
from swinmoe.moe.types import ExpertWeights
from swinmoe.moe.weight_gradients import destination, graph_of_backward

BLOCK_BYTES = 16 * 2**20
"""Size up to which pre-activations come in one block. Larger blocks make faster products, but above 32 MB glibc maps
and unmaps every allocation, and touching fresh pages costs as much as the activation itself."""

SHARE_ROWS = (32, 192)
"""Rows of a thread's share from and up to which a product is cut into shares (`_product`)."""


class Block(NamedTuple):
    """Consecutive rows of one expert."""

    expert: int
    start: int
    stop: int


def expert_mlp(
    rows: Tensor,
    segments: Tensor | None,
    w: ExpertWeights,
    activation: Activation,
    dropout: float = 0.0,
    native: bool = False,
) -> Tensor:
    """fc2_e(dropout(activation(fc1_e(row)))) for the rows of every expert e: an `ExpertFn`, its last arguments bound.

    Args:
        rows: (N, D) with `segments`, or padded (e, n, D).
        segments: (S, e) int64 on the host, rows of each source and expert; None in the padded layout.
        w: stacked weights of e experts.
        activation: between the two layers.
        dropout: probability, after the activation; masks come from the global generator of the rows' device.
        native: whether our kernel in C++ may be taken, where there is a compiler for it and the numbers allow.
    """
    if segments is None:
        num_experts, per_expert, dim = rows.shape
        if rows.device.type != "cpu" or torch.compiler.is_compiling():
            return _batched(rows, w, activation, dropout)
        # Padded rows are ragged rows whose counts happen to be equal, and known without looking.
        counts = [[per_expert] * num_experts]
        return _mlp(rows.reshape(-1, dim), counts, w, activation, dropout, native).view(num_experts, per_expert, dim)
    return _mlp(rows, segments.tolist(), w, activation, dropout, native)


def _mlp(
    rows: Tensor, counts: list[list[int]], w: ExpertWeights, activation: Activation, dropout: float, native: bool
) -> Tensor:
    assert sum(map(sum, counts)) == len(rows), (counts, rows.shape)
    if native and takes(rows, w, activation):
        return kernel_mlp(rows, counts, w, activation, dropout)
    if _has_grouped_kernel(rows, w):
        return grouped_mlp(rows, counts, w, activation, dropout)
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        return blocked_mlp(rows, counts, w, activation, dropout)
    return plain_mlp(rows, counts, w, activation, dropout)


def blocks_of(counts: Sequence[Sequence[int]], limit: int) -> list[Block]:
    """Blocks of at most `limit` rows, expert by expert: an expert's weights stay in the cache while its rows pass."""
    by_expert: list[list[Block]] = [[] for _ in counts[0]] if counts else []
    start = 0
    for source in counts:
        for expert, count in enumerate(source):
            pieces = -(-count // limit)  # of nearly equal length: a short last block would run slowly
            for piece in range(pieces):
                bounds = (start + count * piece // pieces, start + count * (piece + 1) // pieces)
                by_expert[expert].append(Block(expert, *bounds))
            start += count
    return [block for blocks in by_expert for block in blocks]


def _dropped(hidden: Tensor, dropout: float) -> Tensor:
    return F.dropout(hidden, dropout) if dropout else hidden


# --------------------------------------------------------------------------------------------------------------- plain


def plain_mlp(
    rows: Tensor, counts: list[list[int]], w: ExpertWeights, activation: Activation, dropout: float
) -> Tensor:
    """One expert and source at a time. Every weight takes part, empty segments too, so that all have gradients."""
    fc1, fc2 = w.fc1.unbind(), w.fc2.unbind()  # not w[j]: its backward fills a whole stack with zeros for each j
    b1 = [None] * len(fc1) if w.b1 is None else w.b1.unbind()
    b2 = [None] * len(fc2) if w.b2 is None else w.b2.unbind()
    out = []
    pieces = iter(rows.split([count for source in counts for count in source]))
    for source in counts:
        for expert in range(len(source)):
            hidden = _dropped(activation.value(F.linear(next(pieces), fc1[expert], b1[expert])), dropout)
            out.append(F.linear(hidden, fc2[expert], b2[expert]))
    return torch.cat(out)


def _batched(rows: Tensor, w: ExpertWeights, activation: Activation, dropout: float) -> Tensor:
    """Padded rows (e, n, D) by batched products."""
    pre = rows @ w.fc1.transpose(1, 2)
    if w.b1 is not None:
        pre = pre + w.b1.to(pre.dtype).unsqueeze(1)
    out = _dropped(activation.value(pre), dropout) @ w.fc2.transpose(1, 2)
    return out if w.b2 is None else out + w.b2.to(out.dtype).unsqueeze(1)


# ------------------------------------------------------------------------------------------------------------- grouped


def _has_grouped_kernel(rows: Tensor, w: ExpertWeights) -> bool:
    if rows.device.type != "cuda" or (autocast_dtype(rows) or rows.dtype) != torch.bfloat16:
        return False
    if not hasattr(F, "grouped_mm"):  # before torch 2.10
        return False
    # Elsewhere the operator loops over experts with a host sync each; strides must be multiples of 16 bytes.
    aligned = w.fc1.shape[1] % 8 == 0 and w.fc1.shape[2] % 8 == 0 and w.fc2.shape[2] % 8 == 0
    return aligned and torch.cuda.get_device_capability(rows.device) >= (9, 0)


def grouped_mlp(
    rows: Tensor, counts: list[list[int]], w: ExpertWeights, activation: Activation, dropout: float
) -> Tensor:
    """All experts in one `grouped_mm` per layer; rows of several sources are first brought together by expert."""
    dtype = autocast_dtype(rows) or rows.dtype
    by_source = torch.tensor(counts)
    per_expert = by_source.sum(0)
    regroup = _regroup(by_source).to(rows.device, non_blocking=True) if len(counts) > 1 else None
    ends = per_expert.cumsum(0).to(torch.int32).to(rows.device, non_blocking=True)
    expert_of_row = torch.arange(len(per_expert)).repeat_interleave(per_expert).to(rows.device, non_blocking=True)
    x = rows.to(dtype)
    x = x if regroup is None else x.index_select(0, regroup)
    pre = F.grouped_mm(x, w.fc1.to(dtype).transpose(1, 2), offs=ends)
    if w.b1 is not None:
        pre = pre + w.b1.to(dtype).index_select(0, expert_of_row)
    hidden = _dropped(activation.value(_ContiguousGradient.apply(pre)), dropout)
    out = _ContiguousGradient.apply(F.grouped_mm(hidden, w.fc2.to(dtype).transpose(1, 2), offs=ends))
    if w.b2 is not None:
        out = out + w.b2.to(dtype).index_select(0, expert_of_row)
    return out if regroup is None else torch.zeros_like(out).index_copy(0, regroup, out)


def _regroup(counts: Tensor) -> Tensor:
    """Index (N,) that sorts rows ordered (source, expert) by (expert, source)."""
    lengths = counts.reshape(-1)
    order = torch.arange(lengths.numel()).view(counts.shape).t().reshape(-1)
    old, new = lengths.cumsum(0) - lengths, lengths[order].cumsum(0) - lengths[order]
    return (old[order] - new).repeat_interleave(lengths[order]) + torch.arange(int(lengths.sum()))


class _ContiguousGradient(torch.autograd.Function):
    """The identity. `grouped_mm` refuses gradients of stride 0, such as those of a plain sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


# -------------------------------------------------------------------------------------------------------------- blocks


def blocked_mlp(
    rows: Tensor, counts: list[list[int]], w: ExpertWeights, activation: Activation, dropout: float
) -> Tensor:
    """Block by block, in our own autograd Function; honours autocast like `F.linear`."""
    rows = rows.to(autocast_dtype(rows) or rows.dtype)
    keep, scale = _draw_kept(len(rows), w.fc2.shape[2], dropout) if dropout else (None, 1.0)
    blocks = blocks_of(counts, max(1, BLOCK_BYTES // max(1, w.fc1.shape[1] * rows.element_size())))
    tensors = (w.fc1, w.b1, w.fc2, w.b2)
    # Inside `forward` gradient mode is off, whoever calls: ask here whether a backward pass can follow.
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (rows, *tensors))
    out: Tensor = _BlockedMlp.apply(rows, *tensors, keep, blocks, activation, scale, training)
    return out


def _draw_kept(num_rows: int, hidden: int, dropout: float) -> tuple[Tensor, float]:
    """Hidden units that stay, as 0 and 1 (n, F), and what they are multiplied by, so that their mean stays.

    On a CPU `bernoulli_` takes as long as two of a small expert's products: it spends a double on each unit. Here one
    draw serves four units by 16 bits each. The probability is rounded to 1/65536, and the factor is that of the
    rounded one. As bytes, since they become numbers several times faster than booleans do.
    """
    dropped = min(max(round(dropout * 2**16), 1), 2**16 - 1)
    words = torch.empty(-(-num_rows * hidden // 4), dtype=torch.int64, device="cpu").random_(-(2**63), None)
    kept = words.view(torch.int16)[: num_rows * hidden] >= dropped - 2**15
    return kept.view(torch.uint8).view(num_rows, hidden), 2**16 / (2**16 - dropped)


def _kept(keep: Tensor | None, block: Block, dtype: torch.dtype) -> Tensor | None:
    """1 and 0 for a block's hidden units (n, F)."""
    return None if keep is None else keep[block.start : block.stop].to(dtype)


class _BlockedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        fc1: Tensor,
        b1: Tensor | None,
        fc2: Tensor,
        b2: Tensor | None,
        keep: Tensor | None,
        blocks: list[Block],
        activation: Activation,
        scale: float,
        training: bool,
    ) -> Tensor:
        out = rows.new_empty(len(rows), fc2.shape[1])
        saved: list[Tensor] = []
        weights, pieces = _views(fc1.transpose(1, 2), b1, fc2.transpose(1, 2), b2), _pieces(blocks, rows, out)
        for block, (x, y) in zip(blocks, pieces, strict=True):
            w1, c1, w2, c2 = weights[block.expert]
            pre = _affine(x, w1, c1)
            hidden, kept = activation.value(pre), _kept(keep, block, x.dtype)
            if kept is not None:
                hidden = (hidden * kept).mul_(scale)  # not in place: an activation may return what it was given
            _affine(hidden, w2, c2, out=y)
            if training:
                saved += (pre, hidden)
        if training:
            ctx.save_for_backward(rows, fc1, fc2, keep, *saved)
            # Saved tensors may come back as copies (checkpointing, offloading); only the parameter itself has `.grad`.
            # Gathered weights are no parameters, and to keep them would undo what checkpointing saves.
            ctx.parameters = tuple(weight if weight.is_leaf else None for weight in (fc1, fc2))
            ctx.bias_dtypes = (None if b1 is None else b1.dtype, None if b2 is None else b2.dtype)
            ctx.blocks, ctx.activation, ctx.scale = blocks, activation, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad, ctx.creates_graph = graph_of_backward(grad)
        return _blocked_backward(ctx, grad)


@once_differentiable
def _blocked_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, fc1, fc2, keep, *saved = ctx.saved_tensors
    needs_rows, needs_fc1, needs_b1, needs_fc2, needs_b2 = ctx.needs_input_grad[:5]
    # Products of several threads may spill over into the next block's rows, if that one is yet to be written.
    spare = torch.get_num_threads() - 1
    spill = spare if _follow_each_other(ctx.blocks) else 0
    grad_rows = rows.new_empty(len(rows) + spare, rows.shape[1])[: len(rows)] if needs_rows else None
    grad_fc1 = _WeightGradient(fc1, ctx.parameters[0], ctx.creates_graph) if needs_fc1 else None
    grad_fc2 = _WeightGradient(fc2, ctx.parameters[1], ctx.creates_graph) if needs_fc2 else None
    grad_b1 = _BiasGradient(fc1.shape[:2], ctx.bias_dtypes[0], grad) if needs_b1 else None
    grad_b2 = _BiasGradient(fc2.shape[:2], ctx.bias_dtypes[1], grad) if needs_b2 else None
    # To compute hidden units again instead of keeping them was measured: 2 to 4 % slower steps of layer and model.
    # One buffer for all blocks stays in the cache, where a fresh one each would be touched for the first time.
    longest = max((stop - start for _, start, stop in ctx.blocks), default=0)
    scratch = grad.new_empty(longest + spare, fc2.shape[2])
    weights, pieces = _views(fc1, None, fc2, None), _pieces(ctx.blocks, rows, grad, grad_rows)
    for block, pre, hidden, (x, grad_out, grad_x) in zip(ctx.blocks, saved[::2], saved[1::2], pieces, strict=True):
        expert = block.expert
        w1, _, w2, _ = weights[expert]
        if grad_b2 is not None:
            grad_b2.add(expert, grad_out)
        if grad_fc2 is not None:
            grad_fc2.add(expert, grad_out, hidden)
        grad_hidden = torch.mm(grad_out, _as(w2, grad_out.dtype), out=scratch[: len(x)])
        kept = _kept(keep, block, x.dtype)
        if kept is not None:
            grad_hidden.mul_(kept).mul_(ctx.scale)
        grad_pre = ctx.activation.gradient(grad_hidden, pre)
        if grad_b1 is not None:
            grad_b1.add(expert, grad_pre)
        if grad_fc1 is not None:
            grad_fc1.add(expert, grad_pre, x)
        if grad_x is not None:
            _product(grad_pre, _as(w1, grad_pre.dtype), grad_x, spill)
    found = [None if g is None else g.result() for g in (grad_fc1, grad_b1, grad_fc2, grad_b2)]
    return grad_rows, *found, None, None, None, None, None


def _views(*stacks: Tensor | None) -> list[tuple[Any, ...]]:
    """By expert, its part of each stack. All at once: with many small experts, views cost as much as biases do."""
    size = next(len(stack) for stack in stacks if stack is not None)
    return list(zip(*([None] * size if stack is None else stack.unbind() for stack in stacks), strict=True))


def _pieces(blocks: list[Block], *tensors: Tensor | None) -> list[tuple[Any, ...]]:
    """By block, its rows of each tensor."""
    if _follow_each_other(blocks):  # one call instead of one for each block
        sizes = [stop - start for _, start, stop in blocks]
        split = [[None] * len(blocks) if t is None else t.split(sizes) for t in tensors]
        return list(zip(*split, strict=True))
    return [tuple(None if t is None else t[start:stop] for t in tensors) for _, start, stop in blocks]


def _follow_each_other(blocks: list[Block]) -> bool:
    return all(this.stop == after.start for this, after in pairwise(blocks))


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)  # even a conversion to the same dtype takes a microsecond


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x W + b in the dtype of `x`, without gradients."""
    weight = _as(weight, x.dtype)
    if bias is None:
        return torch.mm(x, weight, out=out) if out is not None else torch.mm(x, weight)
    bias = _as(bias, x.dtype)
    if x.dtype.itemsize < 4:  # there the sum has to be wider than its result
        return torch.addmm(bias, x, weight, out=out) if out is not None else torch.addmm(bias, x, weight)
    # `addmm` writes the bias to every row first, which the product then reads: from memory, where it is still in the
    # cache after the product.
    product = torch.mm(x, weight, out=out) if out is not None else torch.mm(x, weight)
    return product.add_(bias)


def _product(x: Tensor, weight: Tensor, out: Tensor, spare: int) -> None:
    """(n, F), (F, D) -> (n, D), without gradients; F is the longer one.

    With few rows, threads that share such a product wait for each other. As a batch of products of one weight, with a
    share of the rows for each thread, it takes a sixth less (2 threads, float32, 144 to 288 rows; as long from 576 on).
    Shares are equal: where rows cannot be cut so, the last share is filled up with what lies behind them in memory.

    Args:
        x, weight: factors.
        out: (n, D), contiguous.
        spare: rows behind `out` that may be written, with arbitrary values.
    """
    rows, dim = out.shape
    parts = torch.get_num_threads()
    share = -(-rows // parts)
    more = share * parts - rows
    small = parts > 1 and SHARE_ROWS[0] <= rows // parts <= SHARE_ROWS[1]
    if not small or x.dtype.itemsize < 4 or not x.is_contiguous() or more > min(spare, _rows_behind(x)):
        torch.mm(x, weight, out=out)
        return
    shares = x.as_strided((parts, share, x.shape[1]), (share * x.shape[1], x.shape[1], 1))
    products = out.as_strided((parts, share, dim), (share * dim, dim, 1))
    torch.bmm(shares, weight.expand(parts, *weight.shape), out=products)


def _rows_behind(x: Tensor) -> int:
    """Rows that the memory of a contiguous (n, F) could still hold behind its last."""
    end = (x.storage_offset() + x.numel()) * x.element_size()
    return int(x.untyped_storage().nbytes() - end) // max(1, x[:1].nbytes)


class _BiasGradient:
    """Collects Σ grad_block per expert: (e, width)."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, like: Tensor) -> None:
        self.stack = like.new_zeros(shape, dtype=dtype)
        self.experts = self.stack.unbind()
        self.begun = [False] * len(self.experts)

    def add(self, expert: int, grad: Tensor) -> None:
        """Add the sum of (n, width) over its rows."""
        target = self.experts[expert]
        if self.begun[expert] or grad.dtype != target.dtype:
            target.add_(grad.sum(0))
        else:
            torch.sum(grad, 0, out=target)
        self.begun[expert] = True

    def result(self) -> Tensor:
        """(e, width); 0 for experts without rows."""
        return self.stack


class _WeightGradient:
    """Collects Σ left_blockᵀ right_block per expert, straight into the parameter's `.grad` where that is safe."""

    def __init__(self, weight: Tensor, parameter: Tensor | None, creates_graph: bool) -> None:
        self.stack, self.in_place = destination(weight, parameter, creates_graph)
        self.experts = self.stack.unbind()
        self.begun = [self.in_place] * len(self.experts)

    def add(self, expert: int, left: Tensor, right: Tensor) -> None:
        """Add leftᵀ right: (n, a), (n, b) -> (a, b)."""
        target = self.experts[expert]
        if left.dtype == target.dtype:
            if self.begun[expert]:
                target.addmm_(left.t(), right)
            else:
                torch.mm(left.t(), right, out=target)
        elif self.begun[expert]:
            target.add_(left.t() @ right)
        else:
            target.copy_(left.t() @ right)
        self.begun[expert] = True

    def result(self) -> Tensor | None:
        """What the backward pass returns: None where `.grad` has it all."""
        if self.in_place:
            return None
        for expert, begun in zip(self.experts, self.begun, strict=True):
            if not begun:
                expert.zero_()
        return self.stack
