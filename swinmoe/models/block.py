"""One Swin block.

Shapes: B images, (H, W) map, D width; maps are (B, H, W, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from swinmoe.config import ModelConfig, resolve_style
from swinmoe.config.model import moe_layer_name
from swinmoe.models.attention import WindowAttention, WindowTables
from swinmoe.models.mlp import Mlp
from swinmoe.moe import MoEMlp
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
            chunks=cfg.chunks_of(stage),
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp: Mlp | MoEMlp
        if cfg.moe is not None and index in cfg.moe_blocks[stage]:
            name = moe_layer_name(stage, index)
            self.mlp = MoEMlp(cfg.moe, dim=dim, hidden_dim=hidden, name=name, seed=seed, init_std=cfg.init_std)
        else:
            self.mlp = Mlp(dim, hidden, fc2_bias=cfg.mlp_fc2_bias, drop=cfg.drop_rate)
        has_extra = cfg.extra_norm_every > 0 and (index + 1) % cfg.extra_norm_every == 0
        self.norm3 = nn.LayerNorm(dim) if has_extra else None

    def forward(
        self,
        x: Tensor,
        tables: WindowTables,
        keep: Tensor | None = None,
        recompute: bool = False,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, H, W, D) -> the same, and what the expert layer reports (None without one).

        `keep` (2, B): factor of each image's attention and MLP branch, 0 or 1/(keep rate); None keeps all.
        `recompute`: activations inside the block are not kept but computed again in the backward pass.
        `noise`: of the experts' gate, from `draw_noise`; None = drawn here where the config asks for it.
        """
        keep_attn, keep_mlp = (None, None) if keep is None else keep.unbind(0)
        if recompute:
            return self._recomputed(x, tables, keep_attn, keep_mlp, noise)
        x, h = self._attend(x, tables, keep_attn)
        y, stats = self.mlp(h, noise) if isinstance(self.mlp, MoEMlp) else (self.mlp(h), None)
        return self._close(x, y, keep_mlp), stats

    def draw_noise(self, x: Tensor) -> Tensor | None:
        """Gate noise for a map (B, H, W, D); None without experts, in evaluation, or where the config has none.

        Apart from `forward`, because a graph of `torch.compile` has no generator of its own.
        """
        if not isinstance(self.mlp, MoEMlp):
            return None
        batch, height, width, _ = x.shape
        return self.mlp.draw_noise(batch * height * width, x.device)

    def _recomputed(
        self,
        x: Tensor,
        tables: WindowTables,
        keep_attn: Tensor | None,
        keep_mlp: Tensor | None,
        noise: Tensor | None,
    ) -> tuple[Tensor, RoutingStats | None]:
        """The same in regions that are recomputed. Routing lies between them: noise is drawn, statistics are counted
        and ranks tell each other their counts once."""
        if not isinstance(self.mlp, MoEMlp):
            return checkpoint(self._dense, x, tables, keep_attn, keep_mlp, use_reentrant=False), None
        x, h = checkpoint(self._attend, x, tables, keep_attn, use_reentrant=False)
        tokens = h.flatten(0, 2)
        if noise is None:
            noise = self.mlp.draw_noise(tokens.shape[0], tokens.device)
        routing, *decided, stats = self.mlp.assign(tokens, noise)
        tokens, assigned = routing.to_carry(tokens), (routing, *decided)
        # To its end, though the last values saved for backward come before: no exchange may be left half done.
        with set_checkpoint_early_stop(False):
            y = checkpoint(self._carry, self.mlp, x, tokens, assigned, keep_mlp, use_reentrant=False)
        return y, stats

    def _dense(self, x: Tensor, tables: WindowTables, keep_attn: Tensor | None, keep_mlp: Tensor | None) -> Tensor:
        x, h = self._attend(x, tables, keep_attn)
        return self._close(x, self.mlp(h), keep_mlp)

    def _carry(self, mlp: MoEMlp, x: Tensor, tokens: Tensor, assigned: Sequence[Any], keep: Tensor | None) -> Tensor:
        return self._close(x, mlp.carry(tokens, *assigned).view(x.shape), keep)

    def _attend(self, x: Tensor, tables: WindowTables, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """The attention branch: the main branch after it, and the input of the MLP."""
        y = self.attn(self.norm1(x), tables) if self.pre_norm else self.norm1(self.attn(x, tables))
        x = _add(x, y, keep)
        return x, self.norm2(x) if self.pre_norm else x

    def _close(self, x: Tensor, y: Tensor, keep: Tensor | None) -> Tensor:
        """The MLP's output `y` joins the main branch."""
        x = _add(x, y if self.pre_norm else self.norm2(y), keep)
        return x if self.norm3 is None else self.norm3(x)


def _add(x: Tensor, branch: Tensor, keep: Tensor | None) -> Tensor:
    """x + branch, the branch weighed per image by `keep` (B,)."""
    return x + branch if keep is None else torch.addcmul(x, branch, keep.view(-1, 1, 1, 1))
