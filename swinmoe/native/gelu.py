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
from swinmoe.native.operators import address, define, differentiate


def biased_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), exact: (*, F) float32 on a CPU, (F,) -> (*, F).

    Raises:
        BackendUnavailableError: the kernel could not be compiled.
        NotImplementedError: second derivatives were asked for.
    """
    return cast(Tensor, torch.ops.swinmoe.biased_gelu(x, bias))


def _sizes(x: Tensor) -> tuple[ctypes.c_int64, ...]:
    width = x.shape[-1]
    return tuple(map(ctypes.c_int64, (x.numel() // max(1, width), width, torch.get_num_threads())))


def _forward(x: Tensor, bias: Tensor) -> Tensor:
    x, bias = x.contiguous(), bias.contiguous()
    out = _forward_shapes(x, bias)
    kernels().swinmoe_biased_gelu_forward(*_sizes(x), *map(address, (x, bias, out)))
    return out


def _forward_shapes(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    grad, x, bias = grad.contiguous(), x.contiguous(), bias.contiguous()
    grads = _backward_shapes(grad, x, bias)
    kernels().swinmoe_biased_gelu_backward(*_sizes(x), *map(address, (grad, x, bias, *grads)))
    return grads


def _backward_shapes(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor], torch.ops.swinmoe.biased_gelu_backward(grad, *ctx.saved_tensors))


define("biased_gelu", "(Tensor x, Tensor bias) -> Tensor", _forward, _forward_shapes)
define("biased_gelu_backward", "(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)", _backward, _backward_shapes)
differentiate(
    "biased_gelu", _keep, _back, "biased_gelu_backward", "set native=False on the model's MLPs, which then have them"
)
