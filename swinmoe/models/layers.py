"""Parameterised layers without torch's own initial draws: `swinmoe.models.initial` fills them from named generators.

Skipping those draws saves time for large models and leaves the global random state as it was, so that building a model
does not change what comes after.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit._trace import is_tracing
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import skip_init


def linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """An uninitialised `nn.Linear` on the default device."""
    layer: nn.Linear = skip_init(nn.Linear, in_features, out_features, bias=bias, device=torch.get_default_device())
    return layer


def exact_on_cpu(x: Tensor) -> bool:
    """Whether layers compute with `x` on a CPU in single or double precision, and no program is being exported."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    return not (torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting() or is_tracing())


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`: (*, in) -> (*, out).

    In a graph for a CPU a linear layer's bias is added apart: the product would first fill its output with copies of
    the bias, a walk over the map, where what follows can add it in a walk that is made anyway. Not where that would
    round twice, nor past hooks and what else may stand in a linear layer's place.
    """
    if torch.compiler.is_compiling() and exact_on_cpu(x) and unobserved(layer):
        return F.linear(x, layer.weight) + layer.bias
    y: Tensor = layer(x)
    return y


def unobserved(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `layer` is a linear layer with a bias and nothing else, whose call nobody watches."""
    if type(layer) is not nn.Linear or layer.bias is None:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    # A graph sees none of these.
    return torch.compiler.is_compiling() or not ("forward" in vars(layer) or _has_any_global_hook())


def patch_conv(in_chans: int, out_chans: int, patch_size: tuple[int, int]) -> nn.Conv2d:
    """An uninitialised convolution whose kernel and stride are one patch, on the default device."""
    layer: nn.Conv2d = skip_init(
        nn.Conv2d, in_chans, out_chans, kernel_size=patch_size, stride=patch_size, device=torch.get_default_device()
    )
    return layer
