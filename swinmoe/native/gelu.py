"""GELU of a map plus a bias, by a kernel of our own (`biased_gelu.cpp`): one walk over the map forward, one backward.

Shapes: (*, F) maps, (F,) bias.

The loops that inductor makes of it spend a function call on each exponential, and sum the bias's gradient in a walk of
its own, column by column; torch's own functions walk over the map once each for bias and activation.
"""

from __future__ import annotations

import ctypes
from typing import Any, cast

import torch
from torch import Tensor

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


def biased_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), exact: (*, F) float32 on a CPU, (F,) -> (*, F).

    Raises:
        BackendUnavailableError: the kernel could not be compiled.
        NotImplementedError: second or forward-mode derivatives were asked for.
        ValueError: other numbers or shapes than these.
    """
    refuse_tangents(x, bias)
    return cast(Tensor, torch.ops.swinmoe.biased_gelu(x, bias))


def _sizes(x: Tensor, bias: Tensor) -> tuple[ctypes.c_int64, ...]:
    expect_numbers(x=x, bias=bias)
    width = x.shape[-1]
    expect(bias.shape == (width,), f"bias of shape {tuple(bias.shape)} does not fit rows of {width}; give ({width},)")
    return tuple(map(ctypes.c_int64, (x.numel() // max(1, width), width, torch.get_num_threads())))


def _forward(x: Tensor, bias: Tensor) -> Tensor:
    x, bias = x.contiguous(), bias.contiguous()
    out = _forward_shapes(x, bias)
    finish(kernels().swinmoe_biased_gelu_forward(*_sizes(x, bias), *map(address, (x, bias, out))))
    return out


def _forward_shapes(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    grad, x, bias = grad.contiguous(), x.contiguous(), bias.contiguous()
    grads = _backward_shapes(grad, x, bias)
    expect_numbers(grad=grad)
    finish(kernels().swinmoe_biased_gelu_backward(*_sizes(x, bias), *map(address, (grad, x, bias, *grads))))
    return grads


def _backward_shapes(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor], torch.ops.swinmoe.biased_gelu_backward(grad, *ctx.saved_tensors))


define("biased_gelu", "(Tensor x, Tensor bias) -> Tensor", _forward, _forward_shapes)
define("biased_gelu_backward", "(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)", _backward, _backward_shapes)
differentiate("biased_gelu", _keep, _back, "biased_gelu_backward", WITHOUT_KERNELS)
