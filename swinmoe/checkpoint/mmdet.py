"""OpenMMLab's names. Their merging unfolds neighbours channel by channel; ours joins them neighbour by neighbour.

Shapes: a merging's reduction (2D, 4D) and norm (4D,): columns (D, 4) there, (4, D) here, and of the four neighbours
(row, column) = (0,0), (0,1), (1,0), (1,1) there; (0,0), (1,0), (0,1), (1,1) here.
"""

from __future__ import annotations

from torch import Tensor

from swinmoe.checkpoint.microsoft import DERIVED
from swinmoe.checkpoint.rules import Layout, Rule, rename

_SWAP = [0, 2, 1, 3]  # its own inverse


def _by_neighbour(x: Tensor) -> Tensor:
    columns: Tensor = x.unflatten(-1, (-1, 4))[..., _SWAP]
    return columns.transpose(-1, -2).flatten(-2).contiguous()


def _by_channel(x: Tensor) -> Tensor:
    columns: Tensor = x.unflatten(-1, (4, -1))[..., _SWAP, :]
    return columns.transpose(-1, -2).flatten(-2).contiguous()


def layout(num_stages: int) -> Layout:
    """Names of a backbone with `num_stages` stages, the norm of whose last output is our final norm."""
    names = rename(
        [
            ("patch_embed.projection.{rest}", "patch_embed.proj.{rest}"),
            ("patch_embed.norm.{rest}", "patch_embed.norm.{rest}"),
            ("stages.{i}.blocks.{j}.attn.w_msa.{rest}", "layers.{i}.blocks.{j}.attn.{rest}"),
            ("stages.{i}.blocks.{j}.ffn.layers.0.0.{rest}", "layers.{i}.blocks.{j}.mlp.fc1.{rest}"),
            ("stages.{i}.blocks.{j}.ffn.layers.1.{rest}", "layers.{i}.blocks.{j}.mlp.fc2.{rest}"),
            ("stages.{i}.blocks.{j}.norm1.{rest}", "layers.{i}.blocks.{j}.norm1.{rest}"),
            ("stages.{i}.blocks.{j}.norm2.{rest}", "layers.{i}.blocks.{j}.norm2.{rest}"),
            (f"norm{num_stages - 1}.{{rest}}", "norm.{rest}"),
            ("head.fc.{rest}", "head.{rest}"),
            ("absolute_pos_embed", "absolute_pos_embed"),
        ]
    )
    merging = tuple(
        Rule(f"stages.{{i}}.downsample.{name}", f"layers.{{i}}.downsample.{name}", _by_neighbour, _by_channel)
        for name in ("reduction.weight", "norm.weight", "norm.bias")
    )
    return Layout("mmdet", (*merging, *names), DERIVED)
