"""One Swin block.

Shapes: B images, (H, W) map, D width; maps are (B, H, W, D).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from swinmoe.config import ModelConfig, resolve_style
from swinmoe.models._experts import MoEMlp
from swinmoe.models.attention import WindowAttention, WindowTables
from swinmoe.models.mlp import Mlp
from swinmoe.moe.types import RoutingStats

Pair = tuple[int, int]


class SwinBlock(nn.Module):
    """Window attention, then an MLP or an expert layer, each on a residual branch with stochastic depth.

    Norms stand before the branches (V1) or end them (V2's res-post-norm); `extra_norm` adds one on the main branch.
    """

    def __init__(self, cfg: ModelConfig, *, stage: int, index: int, window: Pair, seed: int) -> None:
        super().__init__()
        style = resolve_style(cfg.style)
        dim = cfg.embed_dim * 2**stage
        hidden = int(dim * cfg.mlp_ratio)
        self.pre_norm = style.norm == "pre"
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(
            dim,
            cfg.num_heads[stage],
            window,
            style,
            qkv_bias=cfg.qkv_bias,
            attn_drop=cfg.attn_drop_rate,
            drop=cfg.drop_rate,
            mask_value=cfg.mask_value,
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp: Mlp | MoEMlp
        if cfg.moe is not None and index in cfg.moe_blocks[stage]:
            name = f"layers.{stage}.blocks.{index}.mlp"
            self.mlp = MoEMlp(cfg.moe, dim=dim, hidden_dim=hidden, name=name, seed=seed, init_std=cfg.init_std)
        else:
            self.mlp = Mlp(dim, hidden, fc2_bias=cfg.mlp_fc2_bias, drop=cfg.drop_rate)
        has_extra = cfg.extra_norm_every > 0 and (index + 1) % cfg.extra_norm_every == 0
        self.norm3 = nn.LayerNorm(dim) if has_extra else None

    def gate_noise(self, x: Tensor) -> Tensor | None:
        """The noise of the expert layer's gate for a map `x`; drawn apart so that recomputation meets the same."""
        if not isinstance(self.mlp, MoEMlp):
            return None
        batch, height, width, _ = x.shape
        return self.mlp.draw_noise(batch * height * width, x.device)

    def forward(
        self, x: Tensor, tables: WindowTables, keep: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, H, W, D) -> the same, and what the expert layer reports (None without one).

        `keep` (2, B): factor of each image's attention and MLP branch, 0 or 1/(keep rate); None keeps all.
        """
        y = self.attn(self.norm1(x), tables) if self.pre_norm else self.norm1(self.attn(x, tables))
        x = _add(x, y, None if keep is None else keep[0])
        y, stats = self._feed_forward(self.norm2(x) if self.pre_norm else x, noise)
        x = _add(x, y if self.pre_norm else self.norm2(y), None if keep is None else keep[1])
        return (x if self.norm3 is None else self.norm3(x)), stats

    def _feed_forward(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, RoutingStats | None]:
        if isinstance(self.mlp, MoEMlp):
            return self.mlp(x, noise=noise)
        return self.mlp(x), None


def _add(x: Tensor, branch: Tensor, keep: Tensor | None) -> Tensor:
    """x + branch, the branch weighed per image by `keep` (B,)."""
    return x + branch if keep is None else torch.addcmul(x, branch, keep.view(-1, 1, 1, 1))
