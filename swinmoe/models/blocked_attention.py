"""Window attention block by block, with a backward pass of its own: the arithmetic of `WindowAttention` on a CPU.

Shapes: B images, (H, W) padded map, D width, h heads of d = D/h, windows of (wh, ww), rows × cols = n windows of an
image, N = wh·ww tokens of a window, M windows times heads of a block.

A score matrix is N/d times as large as its query, and ordinary autograd walks over all scores of a layer once for each
of product, scale, bias, mask and softmax, forward and backward, each time in memory touched for the first time. Here a
block's scores are made, finished and used while they are in the cache; queries, keys and values are cut from the map,
and outputs put into it, on the way. Kept for the backward pass: the probabilities, and the three as they were used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swinmoe.models.windows import WindowGrid

BLOCK_BYTES = 4 * 2**20
"""Size up to which the scores of several windows come in one block."""

_NORM_FLOOR = 1e-12


class _Block(NamedTuple):
    """Windows that are worked on together: whole rows of windows, of one image or of several whole ones."""

    images: slice
    rows: slice


def blocked_attention(
    qkv: Tensor,
    bias: Tensor,
    head_scale: Tensor | None,
    mask: Tensor | None,
    grid: WindowGrid,
    mask_value: float | None = None,
) -> Tensor:
    """softmax(similarity + bias, hidden pairs at -inf) · v in every window of a padded and shifted map.

    Args:
        qkv: (B, H, W, 3·D), laid out (3, h, d) along its last axis.
        bias: (h, N, N) position bias.
        head_scale: (h,) factors of the cosine similarity; None = dot products over √d.
        mask: (n, N, N) bool, True = may attend; None = all may.
        grid: how the map is cut.
        mask_value: added to hidden pairs instead.

    Returns:
        (B, H, W, D). Gradients of `qkv`, `bias` and `head_scale`; no second derivatives.
    """
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (qkv, bias, head_scale))
    out: Tensor = _BlockedAttention.apply(qkv, bias, head_scale, mask, grid, mask_value, training)
    return out


def _blocks(images: int, rows: int, bytes_per_row: int) -> Iterator[_Block]:
    if rows * bytes_per_row <= BLOCK_BYTES:
        step = max(1, BLOCK_BYTES // (rows * bytes_per_row))
        for first in range(0, images, step):
            yield _Block(slice(first, min(first + step, images)), slice(0, rows))
        return
    step = max(1, BLOCK_BYTES // bytes_per_row)
    for image in range(images):
        for first in range(0, rows, step):
            yield _Block(slice(image, image + 1), slice(first, min(first + step, rows)))


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        bias: Tensor,
        head_scale: Tensor | None,
        mask: Tensor | None,
        grid: WindowGrid,
        mask_value: float | None,
        training: bool,
    ) -> Tensor:
        heads = len(bias)
        (rows, cols), (wh, ww), area = grid.counts, grid.window, grid.area
        images, dim = len(qkv), qkv.shape[-1] // 3
        depth = dim // heads
        parts = qkv.view(images, rows, wh, cols, ww, 3, heads, depth)
        out = qkv.new_empty(images, rows, wh, cols, ww, heads, depth)
        added = bias if mask is None else _hidden(bias, mask.view(rows, cols, area, area), mask_value)
        blocks = list(_blocks(images, rows, cols * heads * area * area * qkv.element_size()))
        saved: list[Tensor] = []
        for block in blocks:
            q, k, v = _cut(parts[block.images, block.rows])
            norms: tuple[Tensor, ...] = ()
            alpha = 1.0
            if head_scale is None:
                alpha = depth**-0.5
            else:
                norms = (_inverse_norm(q), _inverse_norm(k))
                q.mul_(norms[0])
                _by_head(q, heads).mul_(head_scale.view(-1, 1, 1))
                k.mul_(norms[1])
            scores = qkv.new_empty(len(q), area, area)
            here = added if mask is None else added[block.rows]
            scores.view(-1, *here.shape).copy_(here)
            scores.baddbmm_(q, k.transpose(1, 2), alpha=alpha)
            torch.softmax(scores, -1, out=scores)
            _put(out[block.images, block.rows], torch.bmm(scores, v))
            if training:
                saved += (scores, q, k, v, *norms)
        if training:
            ctx.save_for_backward(head_scale, *saved)
            ctx.blocks, ctx.shape, ctx.per_block = blocks, parts.shape, len(saved) // max(1, len(blocks))
        return out.view(images, rows * wh, cols * ww, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        head_scale, *saved = ctx.saved_tensors
        images, rows, wh, cols, ww, _, heads, depth = ctx.shape
        area = wh * ww
        grad_parts = grad.new_empty(ctx.shape)
        grad_map = grad.reshape(images, rows, wh, cols, ww, heads, depth)
        grad_bias = grad.new_zeros(heads, area, area) if ctx.needs_input_grad[1] else None
        grad_scale = None if head_scale is None else torch.zeros_like(head_scale)
        for number, block in enumerate(ctx.blocks):
            weights, q, k, v, *norms = saved[number * ctx.per_block : (number + 1) * ctx.per_block]
            slope = _windows(grad_map[block.images, block.rows])
            scores = torch.bmm(slope, v.transpose(1, 2))
            torch.ops.aten._softmax_backward_data.out(scores, weights, -1, scores.dtype, grad_input=scores)
            if grad_bias is not None:
                grad_bias += scores.view(-1, heads, area, area).sum(0)
            qkv = grad.new_empty(3, *q.shape)
            grad_q, grad_k, grad_v = qkv.unbind(0)
            torch.bmm(weights.transpose(1, 2), slope, out=grad_v)
            torch.bmm(scores, k, out=grad_q)
            torch.bmm(scores.transpose(1, 2), q, out=grad_k)
            if head_scale is None:
                qkv[:2] *= depth**-0.5
            else:
                assert grad_scale is not None
                scale = head_scale.view(-1, 1, 1)
                along = (grad_q * q).sum(-1, keepdim=True)  # q is the unit query times its head's scale
                grad_scale += _by_head(along, heads).sum((0, 2, 3)) / head_scale
                # d(x/|x|) takes out what points along x.
                _by_head(grad_q, heads).mul_(scale).sub_(_by_head(q * along, heads) / scale)
                grad_q.mul_(norms[0])
                grad_k.sub_(k * (grad_k * k).sum(-1, keepdim=True)).mul_(norms[1])
            target = grad_parts[block.images, block.rows]
            target.copy_(qkv.view(3, *_split(target.select(5, 0))).permute(1, 2, 5, 3, 6, 0, 4, 7))
        grad_qkv = grad_parts.view(images, rows * wh, cols * ww, 3 * heads * depth)
        return grad_qkv, grad_bias, grad_scale, None, None, None, None


def _split(part: Tensor) -> tuple[int, ...]:
    """Sizes (b, r, cols, h, wh, ww, d) of windows cut from (b, r, wh, cols, ww, h, d)."""
    images, rows, wh, cols, ww, heads, depth = part.shape
    return images, rows, cols, heads, wh, ww, depth


def _cut(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b, r, wh, cols, ww, 3, h, d) -> q, k, v (M, N, d), copies."""
    area, depth = part.shape[2] * part.shape[4], part.shape[7]
    copy = part.permute(5, 0, 1, 3, 6, 2, 4, 7).contiguous().view(3, -1, area, depth)
    q, k, v = copy.unbind(0)
    return q, k, v


def _windows(part: Tensor) -> Tensor:
    """(b, r, wh, cols, ww, h, d) -> (M, N, d), a copy."""
    area, depth = part.shape[2] * part.shape[4], part.shape[6]
    return part.permute(0, 1, 3, 5, 2, 4, 6).contiguous().view(-1, area, depth)


def _put(part: Tensor, windows: Tensor) -> None:
    """(M, N, d) into its place (b, r, wh, cols, ww, h, d)."""
    part.copy_(windows.view(_split(part)).permute(0, 1, 4, 2, 5, 3, 6))


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(M, N, d) seen as (M/h, h, N, d)."""
    return x.view(-1, heads, *x.shape[1:])


def _inverse_norm(x: Tensor) -> Tensor:
    """1/|x| along the last axis, at most 1e12."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.clamp_(min=_NORM_FLOOR).reciprocal_()


def _hidden(bias: Tensor, allowed: Tensor, value: float | None) -> Tensor:
    """(h, N, N) and (rows, cols, N, N) -> (rows, cols, h, N, N): -inf, or `value` more, where a pair is hidden."""
    allowed = allowed.unsqueeze(2)
    if value is not None:
        return torch.where(allowed, bias, bias + value)
    hidden: Tensor = bias.masked_fill(~allowed, float("-inf"))
    return hidden
