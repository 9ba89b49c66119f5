"""Window attention by a kernel of our own (`window_attention.cpp`): the fastest on a CPU.

Shapes: B images, (H, W) padded map, D width, h heads of d = D/h, windows of (wh, ww), N = wh·ww tokens, L offsets.

What `models/blocked_attention.py` does block by block with torch's operators, the kernel does window by window in a
core's own cache: it cuts heads out of the map, follows the cyclic shift by itself, and keeps two numbers of each row of
scores where others keep the row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from swinmoe.native.build import kernels
from swinmoe.native.operators import address, define, differentiate


def window_attention(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor,
    head_scale: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    mask_value: float | None = None,
) -> Tensor:
    """softmax(similarity + bias, hidden pairs at -inf) · v in every window of a padded map.

    Args:
        qkv: (B, H, W, 3·D) float32 on a CPU, laid out (3, h, d) along its last axis. Not shifted.
        qkv_bias: (3·D,) to add to it.
        bias: (h, L) position bias of each offset.
        head_scale: (h,) factors of the cosine similarity; None = dot products over √d.
        index: (N·N,) int64, each pair's offset.
        mask: (n, N, N) bool for the n windows of an image, True = may attend; None = all may.
        window, shift: (wh, ww), which divides (H, W); by how many rows and columns windows are shifted, cyclically.
        mask_value: added to hidden pairs instead.

    Returns:
        (B, H, W, D), where qkv had it. Gradients of `qkv`, `qkv_bias`, `bias` and `head_scale`.

    Raises:
        BackendUnavailableError: the kernel could not be compiled.
        NotImplementedError: second derivatives were asked for.
    """
    given = (qkv, qkv_bias, bias, head_scale, index, mask, window, shift, mask_value)
    return cast(Tensor, torch.ops.swinmoe.window_attention(*given)[0])


_SIZES = ("images", "height", "width", "heads", "depth", "wh", "ww", "shift_h", "shift_w", "offsets", "threads")


class _Call(ctypes.Structure):
    """`Call` of window_attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*_SIZES, "add_to_hidden")),
        *((name, ctypes.c_void_p) for name in ("qkv", "qkv_bias", "bias", "head_scale", "index", "mask")),
        ("mask_value", ctypes.c_float),
    )


def _call(*given: Any) -> tuple[Any, list[Tensor | None]]:
    """What the kernel is called with, and the tensors whose memory that points to."""
    *tensors, window, shift, mask_value = given
    held = [None if t is None else t.contiguous() for t in tensors]
    qkv, bias = given[0], given[2]
    heads, offsets = bias.shape
    sizes = (*qkv.shape[:3], heads, qkv.shape[3] // (3 * heads), *window, *shift, offsets, torch.get_num_threads())
    call = _Call(*sizes, mask_value is not None, *map(address, held), mask_value or 0.0)
    return ctypes.byref(call), held


def _forward(*given: Any) -> tuple[Tensor, Tensor]:
    results = _forward_shapes(*given)
    call, _held = _call(*given)
    kernels().swinmoe_window_attention_forward(call, *map(address, results))
    return results


def _forward_shapes(qkv: Tensor, qkv_bias: Tensor | None, bias: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """The map, and of each token's row of scores its largest and the inverse of its sum: (windows, h, N, 2), flat."""
    *sides, tripled = qkv.shape
    return qkv.new_empty(*sides, tripled // 3), qkv.new_empty(*sides, 2 * len(bias))


def _backward(grad: Tensor, kept: Tensor, *given: Any) -> tuple[Tensor, ...]:
    grad, grads = grad.contiguous(), _backward_shapes(grad, kept, *given)
    call, _held = _call(*given)
    kernels().swinmoe_window_attention_backward(call, *map(address, (grad, kept, *grads)))
    return grads


def _backward_shapes(
    grad: Tensor, kept: Tensor, qkv: Tensor, qkv_bias: Tensor | None, bias: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    """Of qkv, its bias, the position bias and the heads' scales, whoever wants them."""
    return qkv.new_empty(qkv.shape), qkv.new_empty(qkv.shape[-1]), bias.new_empty(bias.shape), bias.new_empty(len(bias))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, window, shift, mask_value = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.rest = (window, shift, mask_value)


def _back(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = torch.ops.swinmoe.window_attention_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return *(g if too else None for g, too in zip(grads, ctx.needs_input_grad[:4], strict=True)), *[None] * 5


_GIVEN = (
    "Tensor qkv, Tensor? qkv_bias, Tensor bias, Tensor? head_scale, Tensor index, Tensor? mask,"
    " int[] window, int[] shift, float? mask_value"
)
define("window_attention", f"({_GIVEN}) -> (Tensor, Tensor)", _forward, _forward_shapes)
define(
    "window_attention_backward",
    f"(Tensor grad, Tensor kept, {_GIVEN}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_shapes,
)
differentiate(
    "window_attention",
    _keep,
    _back,
    "window_attention_backward",
    "set attention_impl='explicit' on the model's attention layers, which has them",
)
