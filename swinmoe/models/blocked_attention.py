"""Window attention block by block, with a backward pass of its own: the arithmetic of `WindowAttention` on a CPU.

Shapes: B images, (H, W) padded map, D width, h heads of d = D/h, windows of (wh, ww), rows × cols = n windows of an
image, N = wh·ww tokens of a window, L offsets in it, M windows times heads of a block.

A score matrix is N/d times as large as its query, and ordinary autograd walks over all scores of a layer once for each
of product, scale, bias, mask and softmax, forward and backward, each time in memory touched for the first time. Here a
block's scores are made, finished and used while they are in the cache. Kept for the backward pass: the probabilities,
and queries, keys and values as they were used.

A graph of `torch.compile` holds it as an operator. What inductor makes of written-out attention walks over the scores
of a whole map several times: fused loops save some of the walks and none of the trips to memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from swinmoe.models.windows import WindowGrid
from swinmoe.native.operators import define, differentiate

BLOCK_BYTES = 4 * 2**20
"""Size up to which the scores of several windows come in one block."""

_NORM_FLOOR = 1e-12
_ADVICE = "set attention_impl='explicit' on the model's attention layers, which has them"


def blocked_attention(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor,
    head_scale: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    grid: WindowGrid,
    mask_value: float | None = None,
) -> Tensor:
    """softmax(similarity + bias, hidden pairs at -inf) · v in every window of a padded and shifted map.

    Args:
        qkv: (B, H, W, 3·D), laid out (3, h, d) along its last axis.
        qkv_bias: (3·D,) to add to it: here that takes no walk of its own.
        bias: (h, L) position bias of each offset.
        head_scale: (h,) factors of the cosine similarity; None = dot products over √d.
        index: (N·N,) int64, each pair's offset.
        mask: (n, N, N) bool, True = may attend; None = all may.
        grid: how the map is cut.
        mask_value: added to hidden pairs instead.

    Returns:
        (B, H, W, D). Gradients of `qkv`, `qkv_bias`, `bias` and `head_scale`.

    Raises:
        NotImplementedError: second derivatives were asked for; in the first backward pass (`create_graph=True`), and
            where this is an operator of a graph, in the second.
    """
    wanted = (t is not None and t.requires_grad for t in (qkv, qkv_bias, bias, head_scale))
    training = torch.is_grad_enabled() and any(wanted)
    given = (qkv, qkv_bias, bias, head_scale, index, mask, grid.window, mask_value, training)
    if torch.compiler.is_compiling():
        return cast(Tensor, torch.ops.swinmoe.blocked_attention(*given)[0])
    return cast(Tensor, _BlockedAttention.apply(*given))


class _Block(NamedTuple):
    """Windows that are worked on together: whole rows of windows, of one image or of several whole ones."""

    images: slice
    rows: slice
    windows: slice
    """The same among all M windows times heads."""


def _blocks(shape: Sequence[int], heads: int, size: int) -> Iterator[_Block]:
    """Of maps cut to (B, rows, wh, cols, ww, ...), in numbers of `size` bytes."""
    images, rows, wh, cols, ww = shape[:5]
    per_row = cols * heads  # windows times heads
    of_row = per_row * (wh * ww) ** 2 * size  # bytes
    if rows * of_row <= BLOCK_BYTES:
        step = max(1, BLOCK_BYTES // (rows * of_row))
        for first in range(0, images, step):
            last = min(first + step, images)
            yield _Block(slice(first, last), slice(0, rows), slice(first * rows * per_row, last * rows * per_row))
        return
    step = max(1, BLOCK_BYTES // of_row)
    for image in range(images):
        for first in range(0, rows, step):
            last = min(first + step, rows)
            begin, end = ((image * rows + row) * per_row for row in (first, last))
            yield _Block(slice(image, image + 1), slice(first, last), slice(begin, end))


# ---------------------------------------------------------------------------------------------------- forward, backward


class _Kept(NamedTuple):
    """Of the forward pass for the backward pass; of length 0 where none follows."""

    weights: Tensor
    """(M, N, N) probabilities."""
    used: Tensor
    """(3, M, N, d) queries, keys and values as they were multiplied."""
    norms: Tensor
    """(2, M, N, 1) inverse norms of queries and keys; of length 0 for dot products."""


def _room(qkv: Tensor, heads: int, window: Sequence[int], *, cosine: bool, training: bool) -> _Kept:
    """What is kept of a map (B, H, W, 3·D), unwritten."""
    images, rows, wh, cols, ww = _cuts(qkv, window)
    area, depth = wh * ww, qkv.shape[-1] // (3 * heads)
    count = images * rows * cols * heads if training else 0
    return _Kept(
        qkv.new_empty(count, area, area),
        qkv.new_empty(3, count, area, depth),
        qkv.new_empty(2, count if cosine else 0, area, 1),
    )


def _forward(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor,
    head_scale: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    window: Sequence[int],
    mask_value: float | None,
    training: bool,
) -> tuple[Tensor, _Kept]:
    heads = len(bias)
    images, rows, wh, cols, ww = cuts = _cuts(qkv, window)
    area, dim = wh * ww, qkv.shape[-1] // 3
    depth = dim // heads
    alpha = depth**-0.5 if head_scale is None else 1.0
    parts = qkv.view(*cuts, 3, heads, depth)
    of_parts = None if qkv_bias is None else qkv_bias.view(3, 1, 1, 1, heads, 1, 1, depth)
    out = qkv.new_empty(*cuts, heads, depth)
    added = _added(bias, index, mask, area, mask_value)
    if mask is not None:
        added = added.view(rows, cols, heads, area, area)
    kept = _room(qkv, heads, window, cosine=head_scale is not None, training=training)
    for block in _blocks(cuts, heads, qkv.element_size()):
        here = block.windows
        count = here.stop - here.start
        used = kept.used[:, here] if training else qkv.new_empty(3, count, area, depth)
        _cut(parts[block.images, block.rows], of_parts, used)
        if head_scale is not None:
            norms = _inverse_norms(used[:2])
            if training:
                kept.norms[:, here] = norms
            norms[0] *= _by_window(head_scale, norms[0])
            used[:2] *= norms
        scores = kept.weights[here] if training else qkv.new_empty(count, area, area)
        y = _attend(scores, used, added if mask is None else added[block.rows], alpha)
        _put(out[block.images, block.rows], y)
    return out.view(images, rows * wh, cols * ww, dim), kept


def _backward(
    grad: Tensor,
    kept: _Kept,
    head_scale: Tensor | None,
    index: Tensor,
    offsets: Sequence[int],
    window: Sequence[int],
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of qkv; of its bias and of the position bias where they are `wanted`; of the heads' scales where there
    are any. `offsets`: the shape (h, L) of the position bias."""
    heads = offsets[0]
    images, rows, wh, cols, ww = cuts = _cuts(grad, window)
    area, depth = wh * ww, grad.shape[-1] // heads
    alpha = depth**-0.5 if head_scale is None else 1.0
    grad_parts = grad.new_empty(*cuts, 3, heads, depth)
    grad_map = grad.reshape(*cuts, heads, depth)
    qkv_bias_too, bias_too = wanted
    grad_bias = grad.new_zeros(heads, area, area) if bias_too else None
    grad_scale = None if head_scale is None else torch.zeros_like(head_scale)
    for block in _blocks(cuts, heads, grad.element_size()):
        here = block.windows
        used, slopes = kept.used[:, here], grad.new_empty(3, here.stop - here.start, area, depth)
        slope = _windows(grad_map[block.images, block.rows])
        scores = _attend_backward(slope, kept.weights[here], used, slopes, alpha)
        if grad_bias is not None:
            grad_bias += scores.view(-1, heads, area, area).sum(0)
        if head_scale is not None:
            assert grad_scale is not None
            of_head = _by_window(head_scale, scores)
            used, of_used = used[:2], slopes[:2]  # the unit query times its head's scale, and the unit key
            along = (of_used * used).sum(-1, keepdim=True)
            grad_scale += along[0].view(-1, heads, area).sum((0, 2)) / head_scale
            # d(x/|x|) takes out what points along x.
            norms = kept.norms[:, here].clone()
            along *= norms
            along[0] /= of_head
            norms[0] *= of_head
            of_used *= norms
            of_used.addcmul_(used, along, value=-1)
        target = grad_parts[block.images, block.rows]
        target.copy_(slopes.view(3, *_split(target.select(5, 0))).permute(1, 2, 5, 3, 6, 0, 4, 7))
    grad_qkv = grad_parts.view(images, rows * wh, cols * ww, 3 * heads * depth)
    grad_qkv_bias = grad_qkv.flatten(0, 2).sum(0) if qkv_bias_too else None
    if grad_bias is not None:
        grad_bias = grad.new_zeros(*offsets).scatter_add_(1, index.expand(heads, -1), grad_bias.flatten(1))
    return grad_qkv, grad_qkv_bias, grad_bias, grad_scale


def _attend(scores: Tensor, used: Tensor, added: Tensor, alpha: float) -> Tensor:
    """softmax(alpha·q·kᵀ + added) · v: (M, N, d). The probabilities are left in `scores` (M, N, N).

    `added`: (h, N, N) or (..., h, N, N), repeated where M is more.
    """
    q, k, v = used.unbind(0)
    scores.view(-1, *added.shape).copy_(added)
    scores.baddbmm_(q, k.transpose(1, 2), alpha=alpha)
    torch.softmax(scores, -1, out=scores)
    return torch.bmm(scores, v)


def _attend_backward(slope: Tensor, weights: Tensor, used: Tensor, slopes: Tensor, alpha: float) -> Tensor:
    """From the gradient of the output (M, N, d) those of q, k, v into `slopes`; returns that of the scores."""
    (q, k, v), (grad_q, grad_k, grad_v) = used.unbind(0), slopes.unbind(0)
    scores = torch.bmm(slope, v.transpose(1, 2))
    torch.ops.aten._softmax_backward_data.out(scores, weights, -1, scores.dtype, grad_input=scores)
    torch.bmm(weights.transpose(1, 2), slope, out=grad_v)
    torch.baddbmm(grad_q, scores, k, beta=0, alpha=alpha, out=grad_q)
    torch.baddbmm(grad_k, scores.transpose(1, 2), q, beta=0, alpha=alpha, out=grad_k)
    return scores


def _added(bias: Tensor, index: Tensor, mask: Tensor | None, area: int, mask_value: float | None) -> Tensor:
    """What joins the scores: from the bias of offsets (h, L) that of pairs (h, N, N), or with a mask (n, h, N, N)."""
    of_pairs = bias.index_select(1, index).view(-1, area, area)
    if mask is None:
        return of_pairs
    allowed = mask.unsqueeze(1)
    if mask_value is not None:
        return torch.where(allowed, of_pairs, of_pairs + mask_value)
    hidden: Tensor = of_pairs.masked_fill(~allowed, float("-inf"))
    return hidden


def _cuts(x: Tensor, window: Sequence[int]) -> tuple[int, int, int, int, int]:
    """(B, rows, wh, cols, ww) of a map (B, H, W, *)."""
    (images, height, width), (wh, ww) = x.shape[:3], window
    return images, height // wh, wh, width // ww, ww


def _split(part: Tensor) -> tuple[int, ...]:
    """Sizes (b, r, cols, h, wh, ww, d) of windows cut from (b, r, wh, cols, ww, h, d)."""
    images, rows, wh, cols, ww, heads, depth = part.shape
    return images, rows, cols, heads, wh, ww, depth


def _cut(part: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """(b, r, wh, cols, ww, 3, h, d) into (3, M, N, d), with a bias (3, 1, 1, 1, h, 1, 1, d) added to it."""
    out = out.view(3, *_split(part.select(5, 0)))
    part = part.permute(5, 0, 1, 3, 6, 2, 4, 7)
    if bias is None:
        out.copy_(part)
    else:
        torch.add(part, bias, out=out)


def _windows(part: Tensor) -> Tensor:
    """(b, r, wh, cols, ww, h, d) -> (M, N, d), a copy."""
    area, depth = part.shape[2] * part.shape[4], part.shape[6]
    return part.permute(0, 1, 3, 5, 2, 4, 6).contiguous().view(-1, area, depth)


def _put(part: Tensor, windows: Tensor) -> None:
    """(M, N, d) into its place (b, r, wh, cols, ww, h, d)."""
    part.copy_(windows.view(_split(part)).permute(0, 1, 4, 2, 5, 3, 6))


def _inverse_norms(x: Tensor) -> Tensor:
    """1/|x| along the last axis, at most 1e12."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norms.clamp_(min=_NORM_FLOOR).reciprocal_()


def _by_window(head_scale: Tensor, like: Tensor) -> Tensor:
    """(h,) -> (M, 1, 1)."""
    return head_scale.repeat(len(like) // len(head_scale)).view(-1, 1, 1)


# ----------------------------------------------------------------------------------------- autograd, as a model runs


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For the backward pass, from what `_forward` took and gave."""
    _, _, bias, head_scale, index, _, window, _, training = inputs
    if training:
        ctx.save_for_backward(*output[1:], head_scale, index)
        ctx.offsets, ctx.window = bias.shape, window


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        """Takes what `_forward` takes."""
        out, kept = _forward(*given)
        _keep(ctx, given, (out, *kept))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # Not `once_differentiable`: `autograd.grad` walks past its error to inputs that have other ways.
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"attention in blocks has no second derivatives (create_graph=True was given); {_ADVICE}"
            )
        *kept, head_scale, index = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:3]
        grads = _backward(grad, _Kept(*kept), head_scale, index, ctx.offsets, ctx.window, wanted)
        return *grads, None, None, None, None, None


# ----------------------------------------------------------------------------------- an operator, for `torch.compile`


def _operator(*given: Any) -> tuple[Tensor, ...]:
    out, kept = _forward(*given)
    return out, *kept


def _operator_shapes(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor,
    head_scale: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    window: Sequence[int],
    mask_value: float | None,
    training: bool,
) -> tuple[Tensor, ...]:
    out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    return out, *_room(qkv, len(bias), window, cosine=head_scale is not None, training=training)


def _operator_backward(grad: Tensor, weights: Tensor, used: Tensor, norms: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """An operator returns tensors: of length 0 where there is no gradient."""
    grads = _backward(grad, _Kept(weights, used, norms), *rest)
    return tuple(grad.new_empty(0) if g is None else g for g in grads)


def _operator_backward_shapes(
    grad: Tensor,
    weights: Tensor,
    used: Tensor,
    norms: Tensor,
    head_scale: Tensor | None,
    index: Tensor,
    offsets: Sequence[int],
    window: Sequence[int],
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    tripled = 3 * grad.shape[-1]
    return (
        grad.new_empty(*grad.shape[:-1], tripled),
        grad.new_empty(tripled if wanted[0] else 0),
        grad.new_empty(*offsets) if wanted[1] else grad.new_empty(0),
        grad.new_empty(0) if head_scale is None else torch.empty_like(head_scale),
    )


def _back(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:4]
    grads = torch.ops.swinmoe.blocked_attention_backward(grad, *ctx.saved_tensors, ctx.offsets, ctx.window, wanted[1:3])
    return *(g if too else None for g, too in zip(grads, wanted, strict=True)), None, None, None, None, None


define(
    "blocked_attention",
    "(Tensor qkv, Tensor? qkv_bias, Tensor bias, Tensor? head_scale, Tensor index, Tensor? mask, int[] window,"
    " float? mask_value, bool training) -> (Tensor, Tensor, Tensor, Tensor)",
    _operator,
    _operator_shapes,
)
define(
    "blocked_attention_backward",
    "(Tensor grad, Tensor weights, Tensor used, Tensor norms, Tensor? head_scale, Tensor index, int[] offsets,"
    " int[] window, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _operator_backward,
    _operator_backward_shapes,
)
differentiate("blocked_attention", _keep, _back, "blocked_attention_backward", _ADVICE)
