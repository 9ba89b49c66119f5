"""Where a non-finite value first appears: the forward pass once more, watching every module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from swinmoe.parallel import local_part


def non_finite_parameter(model: nn.Module) -> str | None:
    """The first parameter held here that has a non-finite value, or None."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(local_part(parameter)).all()):
            return f"parameter {name!r}"
    return None


def first_non_finite(model: nn.Module, forward: Callable[[], Any], autocast: Callable[[], Any]) -> str | None:
    """The innermost module, first in execution order, that puts out a non-finite value; None if all are finite.

    Runs `forward` to its end whatever it meets.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            leaves = (x for x in tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point())
            if not found and any(not bool(torch.isfinite(x).all()) for x in leaves):
                inputs = (x for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.is_floating_point())
                fed = any(not bool(torch.isfinite(x).all()) for x in inputs)
                found.append(f"the input of layer {name!r}" if fed else f"layer {name!r}")

        return hook

    handles = [m.register_forward_hook(watch(name or "the model")) for name, m in model.named_modules()]
    try:
        with torch.no_grad(), autocast():
            result = forward()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    return None if bool(torch.isfinite(result.loss_sum)) else "the loss"
