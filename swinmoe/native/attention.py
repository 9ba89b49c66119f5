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
from torch.utils.flop_counter import register_flop_formula

from swinmoe.native.build import kernels
from swinmoe.native.operators import (
    WITHOUT_KERNELS,
    address,
    define,
    differentiate,
    expect,
    expect_numbers,
    finish,
    refuse_tangents,
)


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
        NotImplementedError: second or forward-mode derivatives were asked for.
        ValueError: other numbers or shapes than these.
    """
    refuse_tangents(qkv, qkv_bias, bias, head_scale)
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
    _check(*given)
    *tensors, window, shift, mask_value = given
    held = [None if t is None else t.contiguous() for t in tensors]
    qkv, bias = given[0], given[2]
    heads, offsets = bias.shape
    sizes = (*qkv.shape[:3], heads, qkv.shape[3] // (3 * heads), *window, *shift, offsets, torch.get_num_threads())
    call = _Call(*sizes, mask_value is not None, *map(address, held), mask_value or 0.0)
    return ctypes.byref(call), held


def _check(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    bias: Tensor,
    head_scale: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    mask_value: float | None,
) -> None:
    expect_numbers(qkv=qkv, qkv_bias=qkv_bias, bias=bias, head_scale=head_scale)
    (_, height, width, tripled), (heads, _) = qkv.shape, bias.shape
    (wh, ww), (sh, sw) = window, shift
    expect(height % wh == 0 and width % ww == 0, f"windows of {wh}x{ww} do not divide a map of {height}x{width}")
    expect(0 <= sh <= height and 0 <= sw <= width, f"a shift by ({sh}, {sw}) leaves a map of {height}x{width}")
    expect(tripled % (3 * heads) == 0, f"3 x {heads} heads do not divide a width of {tripled}")
    area, count = wh * ww, height // wh * (width // ww)
    for name, t, shape, dtype in (
        ("qkv_bias", qkv_bias, (tripled,), torch.float32),
        ("head_scale", head_scale, (heads,), torch.float32),
        ("index", index, (area * area,), torch.int64),
        ("mask", mask, (count, area, area), torch.bool),
    ):
        fits = t is None or (tuple(t.shape) == shape and t.dtype == dtype)
        expect(fits, f"{name} is {t is not None and (t.dtype, tuple(t.shape))}; it must be {dtype} of shape {shape}")


def _forward(*given: Any) -> tuple[Tensor, Tensor]:
    results = _forward_shapes(*given)
    call, _held = _call(*given)
    finish(kernels().swinmoe_window_attention_forward(call, *map(address, results)))
    return results


def _forward_shapes(qkv: Tensor, qkv_bias: Tensor | None, bias: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """The map, and of each token's row of scores its largest and the inverse of its sum: (windows, h, N, 2), flat."""
    *sides, tripled = qkv.shape
    return qkv.new_empty(*sides, tripled // 3), qkv.new_empty(*sides, 2 * len(bias))


def _backward(grad: Tensor, kept: Tensor, *given: Any) -> tuple[Tensor, ...]:
    expect_numbers(grad=grad, kept=kept)
    grad, kept, grads = grad.contiguous(), kept.contiguous(), _backward_shapes(grad, kept, *given)
    call, _held = _call(*given)
    finish(kernels().swinmoe_window_attention_backward(call, *map(address, (grad, kept, *grads))))
    return grads


def _backward_shapes(
    grad: Tensor, kept: Tensor, qkv: Tensor, qkv_bias: Tensor | None, bias: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    """Of qkv, its bias, the position bias and the heads' scales, whoever wants them."""
    return qkv.new_empty(qkv.shape), qkv.new_empty(qkv.shape[-1]), bias.new_empty(bias.shape), bias.new_empty(len(bias))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, window, shift, mask_value = inputs
    ctx.set_materialize_grads(False)  # of what is kept there is none
    ctx.save_for_backward(output[1], *tensors)
    ctx.rest = (window, shift, mask_value)


def _back(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
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
    WITHOUT_KERNELS,
)


@register_flop_formula(torch.ops.swinmoe.window_attention)
def _flops(qkv: Sequence[int], *_: Any, out_val: Any = None, **__: Any) -> int:
    """Of both products: `_[5]` is the window."""
    batch, height, width, tripled = qkv
    wh, ww = _[5]
    return int(2 * 2 * batch * height * width * wh * ww * (tripled // 3))


@register_flop_formula(torch.ops.swinmoe.window_attention_backward)
def _flops_backward(grad: Sequence[int], kept: Sequence[int], qkv: Sequence[int], *rest: Any, **__: Any) -> int:
    """The scores once more, and two products for each of the forward pass."""
    return int(_flops(qkv, *rest)) * 5 // 2
