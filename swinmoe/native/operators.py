"""How a kernel becomes an operator of torch, which graphs of `torch.compile` hold like any other."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("swinmoe", "FRAGMENT")

WITHOUT_KERNELS = (
    "set attention_impl='explicit' on the model's attention layers and native=False on its MLPs, which then have them"
)
"""What to do for derivatives that the kernels do not have: a model takes both or neither."""


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


def expect(holds: bool, what: str) -> None:
    """A kernel sees addresses alone: what is not as it must be is refused before.

    Raises:
        ValueError: `holds` is false; `what` says what was given, and what is allowed.
    """
    if not holds:
        raise ValueError(what)


def expect_numbers(**tensors: Tensor | None) -> None:
    """Each of these is None or float32 on a CPU.

    Raises:
        ValueError: one is not.
    """
    for name, t in tensors.items():
        if t is not None and (t.dtype != torch.float32 or t.device.type != "cpu"):
            raise ValueError(f"{name} is {t.dtype} on {t.device}; our kernels take float32 on a CPU alone")


def finish(status: int) -> None:
    """What a kernel returned.

    Raises:
        MemoryError: it had too little.
    """
    if status:
        raise MemoryError(
            "a kernel of swinmoe.native found no memory for its threads; use fewer of them, or smaller windows"
        )


def refuse_tangents(*given: Any) -> None:
    """Forward-mode derivatives are not there, and would get lost without a word.

    Raises:
        NotImplementedError: an argument has one.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in given):
        raise NotImplementedError(f"our kernels in C++ have no forward-mode derivatives; {WITHOUT_KERNELS}")


def address(t: Tensor | None) -> ctypes.c_void_p | None:
    """Where a tensor's numbers lie; null for None."""
    return None if t is None else ctypes.c_void_p(t.data_ptr())
