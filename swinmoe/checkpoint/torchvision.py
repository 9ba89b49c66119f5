"""torchvision's names: stages and mergings count through one list `features`.

Shapes: D width; the joint bias of q, k and v is (3D,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from swinmoe.checkpoint.microsoft import DERIVED
from swinmoe.checkpoint.rules import Layout, Rule, rename

_BLOCK, _OURS = "features.{2i+1}.{j}", "layers.{i}.blocks.{j}"

_COMMON = rename(
    [
        ("features.0.0.{rest}", "patch_embed.proj.{rest}"),
        ("features.0.2.{rest}", "patch_embed.norm.{rest}"),
        (f"{_BLOCK}.mlp.0.{{rest}}", f"{_OURS}.mlp.fc1.{{rest}}"),
        (f"{_BLOCK}.mlp.3.{{rest}}", f"{_OURS}.mlp.fc2.{{rest}}"),
        (f"{_BLOCK}.{{rest}}", f"{_OURS}.{{rest}}"),
        ("features.{2i+2}.{rest}", "layers.{i}.downsample.{rest}"),
        ("norm.{rest}", "norm.{rest}"),
        ("head.{rest}", "head.{rest}"),
    ]
)


def _split_bias(bias: Tensor) -> tuple[Tensor, Tensor]:
    """(3D,) -> biases of q and v. torchvision sets the part of k to zero whenever it computes, whatever it holds."""
    q, _, v = bias.chunk(3)
    return q.clone(), v.clone()


def _join_bias(q: Tensor, v: Tensor) -> Tensor:
    return torch.cat((q, torch.zeros_like(q), v))


_COSINE_BIAS = Rule(
    f"{_BLOCK}.attn.qkv.bias", (f"{_OURS}.attn.q_bias", f"{_OURS}.attn.v_bias"), _split_bias, _join_bias
)

TORCHVISION_V1 = Layout("torchvision", _COMMON, DERIVED)
TORCHVISION_V2 = Layout("torchvision-v2", (_COSINE_BIAS, *_COMMON), DERIVED)
