"""Parameterised layers without torch's own initial draws: `swinmoe.models.initial` fills them from named generators.

Skipping those draws saves time for large models and leaves the global random state as it was, so that building a model
does not change what comes after.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init


def linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """An uninitialised `nn.Linear` on the default device."""
    layer: nn.Linear = skip_init(nn.Linear, in_features, out_features, bias=bias, device=torch.get_default_device())
    return layer


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`: (*, in) -> (*, out).

    In a graph for a CPU the bias is added apart: the product would first fill its output with copies of the bias, a
    walk over the map, where what follows can add it in a walk that is made anyway.
    """
    if bias is None or x.device.type != "cpu" or not torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    y = F.linear(x, weight)
    return y + bias.to(y.dtype)  # under autocast they differ


def patch_conv(in_chans: int, out_chans: int, patch_size: tuple[int, int]) -> nn.Conv2d:
    """An uninitialised convolution whose kernel and stride are one patch, on the default device."""
    layer: nn.Conv2d = skip_init(
        nn.Conv2d, in_chans, out_chans, kernel_size=patch_size, stride=patch_size, device=torch.get_default_device()
    )
    return layer
