"""Initial weights: every parameter is drawn from a generator named after it.

A parameter's values depend on (seed, its full name, its shape) alone. Twins therefore start bit-equal wherever they
share a parameter, on any device, in any dtype and at any world size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from swinmoe.config import ModelConfig, resolve_style
from swinmoe.moe import MoEMlp
from swinmoe.randomness import generator

_TABLES = ("relative_position_bias_table", "absolute_pos_embed")
_POSITION_STD = 0.02
_LOGIT_SCALE = math.log(10.0)


@torch.no_grad()
def initialize(model: nn.Module, cfg: ModelConfig, seed: int, prefix: str = "") -> None:
    """Fill every parameter of `model` but those of expert layers, which draw their own; meta tensors are left alone.

    Linear weights: truncated normal of `cfg.init_std`; biases 0. Norms 1 and 0; those that end a residual branch
    `cfg.res_post_norm_init` and 0. Convolution: uniform within 1/sqrt(fan-in). Position tables: truncated normal 0.02.
    `prefix` is the full name of `model` where it is a part of a larger one.
    """
    for name, module in _modules(model, prefix):
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                continue
            full = f"{name}.{leaf}" if name else leaf
            # Drawn in float32 on the CPU whatever the parameter's home: the same values everywhere.
            value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            _draw(value, module, name.rpartition(".")[2], leaf, cfg, generator(seed, full))
            parameter.copy_(value)


def _modules(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """All modules with their names, without going into expert layers."""
    if isinstance(module, MoEMlp):
        return []
    found = [(name, module)]
    for child_name, child in module.named_children():
        found += _modules(child, f"{name}.{child_name}" if name else child_name)
    return found


def _draw(value: Tensor, module: nn.Module, name: str, leaf: str, cfg: ModelConfig, rng: torch.Generator) -> None:
    if isinstance(module, nn.Conv2d):
        bound = 1 / math.sqrt(module.in_channels * math.prod(module.kernel_size))
        value.uniform_(-bound, bound, generator=rng)
    elif isinstance(module, nn.Linear) and leaf == "weight":
        nn.init.trunc_normal_(value, std=cfg.init_std, generator=rng)
    elif isinstance(module, nn.LayerNorm) and leaf == "weight":
        ends_branch = resolve_style(cfg.style).norm == "res-post" and name in ("norm1", "norm2")
        value.fill_(cfg.res_post_norm_init if ends_branch else 1.0)
    elif leaf in _TABLES:
        nn.init.trunc_normal_(value, std=_POSITION_STD, generator=rng)
    elif leaf == "logit_scale":
        value.fill_(_LOGIT_SCALE)
    else:
        value.zero_()
