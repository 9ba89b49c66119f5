"""How a kernel becomes an operator of torch, which graphs of `torch.compile` hold like any other."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("swinmoe", "FRAGMENT")


def define(name: str, schema: str, kernel: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """The operator `swinmoe::name` on CPUs.

    Args:
        name, schema: what it is called and takes, `(Tensor x, ...) -> Tensor`.
        kernel: that computes it.
        shapes: the same arguments -> tensors like its results, unwritten.
    """
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, kernel, "CPU")
    torch.library.register_fake(f"swinmoe::{name}", shapes, lib=_LIBRARY)


def differentiate(name: str, keep: Callable[..., None], back: Callable[..., Any], backward: str, advice: str) -> None:
    """Give `name` a backward pass, by the operator `backward`, which has none of its own.

    Args:
        keep: (ctx, inputs, output), what is saved.
        back: (ctx, *gradients) -> gradients of the inputs.
        advice: what to do for second derivatives.
    """

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"swinmoe::{name} has no second derivatives; {advice}")

    torch.library.register_autograd(f"swinmoe::{name}", back, setup_context=keep, lib=_LIBRARY)
    torch.library.register_autograd(f"swinmoe::{backward}", refuse, lib=_LIBRARY)


def address(t: Tensor | None) -> ctypes.c_void_p | None:
    """Where a tensor's numbers lie; null for None."""
    return None if t is None else ctypes.c_void_p(t.data_ptr())
