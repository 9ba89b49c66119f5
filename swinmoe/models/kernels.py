"""What of a model on a CPU is computed by our kernels in C++. Expert layers take theirs unless they are told not to."""

from __future__ import annotations

from torch import nn

from swinmoe.errors import BackendUnavailableError
from swinmoe.models.attention import WindowAttention
from swinmoe.models.mlp import Mlp
from swinmoe.moe import Experts, MoEMlp, Router
from swinmoe.native import kernels


def use_native_kernels(model: nn.Module, *, experts: bool = True) -> None:
    """Let `model` take our kernels, in place: attention layers (those with `attention_impl` "auto"), dense MLPs and
    expert layers.

    They are taken in float32 alone: under autocast, in float64 and in exported programs all is as it was. Sums are made
    in another order, so that results differ in the last digits. Copies of the model take them too.

    Args:
        model: on a CPU.
        experts: False leaves expert layers as they are.

    Raises:
        BackendUnavailableError: the model is not on a CPU, or the kernels could not be compiled.
    """
    elsewhere = {parameter.device.type for parameter in model.parameters()} - {"cpu"}
    if elsewhere:
        raise BackendUnavailableError(
            f"our kernels in C++ are for CPUs and the model is on {', '.join(sorted(elsewhere))}; "
            "leave train.native_kernels at 'experts', or train on a CPU"
        )
    kernels()
    for module in model.modules():
        if isinstance(module, WindowAttention) and module.attention_impl == "auto":
            module.attention_impl = "native"
        if isinstance(module, Mlp) or (experts and isinstance(module, Experts | MoEMlp | Router)):
            module.native = True


def leave_native_kernels(model: nn.Module) -> None:
    """Let nothing of `model` take our kernels, in place: all is computed operator by operator, by torch."""
    for module in model.modules():
        if isinstance(module, WindowAttention) and module.attention_impl == "native":
            module.attention_impl = "auto"
        if isinstance(module, Mlp | Experts | MoEMlp | Router):
            module.native = False
