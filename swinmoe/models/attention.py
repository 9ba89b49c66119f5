"""Self-attention inside (shifted) windows of a map.

Shapes: B images, (H, W) map, D width, h heads of d = D/h, n windows of N = wh·ww tokens, L offsets in a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinmoe.config import StyleConfig
from swinmoe.models.blocked_attention import blocked_attention
from swinmoe.models.layers import exact_on_cpu, linear, project
from swinmoe.models.position import num_offsets, resize_table
from swinmoe.models.sequential import attend_in_chunks
from swinmoe.models.windows import WindowGrid
from swinmoe.native import window_attention

Pair = tuple[int, int]
AttentionImpl = Literal["auto", "explicit", "sdpa", "native"]

_MAX_LOG_SCALE = math.log(100.0)


@dataclass(frozen=True)
class WindowTables:
    """What a stage prepares once for all its blocks of one shift."""

    grid: WindowGrid
    index: Tensor
    """(N·N,) int64 into the table of offsets."""
    offsets: Tensor | None
    """(L, 2) log-spaced offsets; None with a learned table."""
    mask: Tensor | None
    """(n, N, N) bool, True = may attend; None where all may."""


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a relative position bias.

    Similarity is the scaled dot product, or (V2 eq. 2) the cosine times a learned scale per head, held at 100 or below.
    The bias is a learned table of offsets, or an MLP on log-spaced offsets (V2 §3.3), through 16·sigmoid in V2's code.
    Cosine attention has biases for q and v and none for k; dot-product attention has one bias for all three.
    """

    attention_impl: AttentionImpl = "auto"
    """`explicit`: softmax(q·k) written out. `sdpa`: torch's fused function. `auto`: the fastest that torch alone gives.
    `native`: our kernel in C++ where it can be used (float32 on a CPU, no dropout of weights), else as `auto`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Pair,
        style: StyleConfig,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        mask_value: float | None = None,
        chunks: int = 1,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.style = style
        self.attn_drop = attn_drop
        self.drop = drop
        self.mask_value = mask_value
        self.chunks = chunks
        cosine = style.similarity == "cosine"
        if cosine:
            self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1))
        if style.position_bias == "table":
            self.relative_position_bias_table = nn.Parameter(torch.empty(num_offsets(window), num_heads))
        else:
            self.cpb_mlp = nn.Sequential(linear(2, 512), nn.ReLU(), linear(512, num_heads, bias=False))
        self.qkv = linear(dim, 3 * dim, bias=qkv_bias and not cosine)
        if cosine:
            self.q_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None
            self.v_bias = nn.Parameter(torch.empty(dim)) if qkv_bias else None
        self.proj = linear(dim, dim)

    def forward(self, x: Tensor, tables: WindowTables) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D)."""
        grid = tables.grid
        (height, width), (pad_h, pad_w), (sh, sw) = grid.size, grid.padding, grid.shift
        if pad_h or pad_w:
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
        rolled = (sh or sw) and not self._native(x)  # the kernel follows the shift by itself
        if rolled:
            x = torch.roll(x, (-sh, -sw), (1, 2))
        x = self._attend(x, tables)
        if rolled:
            x = torch.roll(x, (sh, sw), (1, 2))
        if pad_h or pad_w:
            x = x[:, :height, :width]
        return F.dropout(project(self.proj, x), self.drop, self.training)

    def resize_window(self, old: Pair, new: Pair) -> None:
        """Fit a learned bias table made for window `old` to window `new`; log-spaced offsets need no edit."""
        if self.style.position_bias == "table" and old != new:
            table = self.relative_position_bias_table
            resized = resize_table(table.detach(), old, new)
            self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)

    def _attend(self, x: Tensor, tables: WindowTables) -> Tensor:
        """Attention on a padded map, already shifted where it has to be."""
        bias, qkv_bias = self.offset_bias(tables), self._qkv_bias()
        if self._native(x):
            given = (F.linear(x, self.qkv.weight), qkv_bias, bias, self._head_scale(), tables.index, tables.mask)
            return window_attention(*given, tables.grid.window, tables.grid.shift, self.mask_value)
        if self.chunks == 1 and self._blocked(x):
            return self._attend_windows(F.linear(x, self.qkv.weight), bias, tables, qkv_bias)
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        if self.chunks == 1:
            return self._attend_windows(qkv, bias, tables)
        draws = self.attn_drop > 0 and self.training
        return attend_in_chunks(self._attend_windows, self.chunks, qkv, bias, tables, draws=draws)

    def _attend_windows(
        self, qkv: Tensor, bias: Tensor, tables: WindowTables, qkv_bias: Tensor | None = None
    ) -> Tensor:
        """(B, H, W, 3·D) and the bias of offsets (h, L) -> (B, H, W, D). Windows are cut by the same copy that splits
        the heads; `qkv_bias`: what `qkv` still lacks, for `blocked_attention` alone."""
        grid, heads = tables.grid, self.num_heads
        (rows, cols), (wh, ww) = grid.counts, grid.window
        batch, dim = qkv.shape[0], qkv.shape[-1] // 3
        if self._blocked(qkv):
            of_heads = self._head_scale()
            return blocked_attention(qkv, qkv_bias, bias, of_heads, tables.index, tables.mask, grid, self.mask_value)
        qkv = qkv.view(batch, rows, wh, cols, ww, 3, heads, dim // heads).permute(5, 0, 1, 3, 6, 2, 4, 7)
        # Without a mask the bias differs by head only; with one, by window and head: either way axis 1 is the bias's.
        lead = (batch * grid.num_windows, heads) if tables.mask is None else (batch, grid.num_windows * heads)
        q, k, v = qkv.reshape(3, *lead, grid.area, dim // heads).unbind(0)
        if self.style.similarity == "cosine":
            q = _normalize(q) * self._scale(lead[1] // heads).to(q.dtype)
            k = _normalize(k)
            scale = 1.0
        else:
            scale = (dim // heads) ** -0.5
        of_pairs = bias.index_select(1, tables.index).view(heads, grid.area, grid.area)
        y = self._weigh(q, k, v, self._hide(of_pairs, tables.mask), scale)
        y = y.view(batch, rows, cols, heads, wh, ww, dim // heads).permute(0, 1, 4, 2, 5, 3, 6)
        return y.reshape(batch, rows * wh, cols * ww, dim)

    def _blocked(self, x: Tensor) -> bool:
        """Whether a pass over `x`, or what a linear layer makes of it, is one for `blocked_attention`."""
        dropped = self.attn_drop > 0 and self.training
        return self.attention_impl in ("auto", "native") and exact_on_cpu(x) and not dropped

    def _native(self, x: Tensor) -> bool:
        """Whether a pass over the map `x` is one for `window_attention`."""
        return self.attention_impl == "native" and self.chunks == 1 and x.dtype == torch.float32 and self._blocked(x)

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        """(b, a, N, d) three times and an additive bias (a, N, N) -> (b, a, N, d)."""
        impl = self.attention_impl
        if impl in ("auto", "native"):
            # On a CPU the fused function is faster for no shape of windows (docs/decisions/0007), with or without a
            # gradient of the bias; on other devices it was never measured.
            impl = "explicit" if q.device.type == "cpu" else "sdpa"
        rate = self.attn_drop if self.training else 0.0
        if impl == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout_p=rate, scale=scale)
        scores = (q if scale == 1.0 else q * scale) @ k.transpose(-2, -1) + bias
        weights = F.dropout(scores.softmax(-1), rate, self.training)
        return weights.to(v.dtype) @ v

    def _qkv_bias(self) -> Tensor | None:
        if self.style.similarity == "dot":
            return self.qkv.bias
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))

    def _scale(self, repeats: int) -> Tensor:
        """exp(min(logit_scale, ln 100)) of each head, once for every window: (repeats·h, 1, 1)."""
        return self.logit_scale.clamp(max=_MAX_LOG_SCALE).exp().repeat(repeats, 1, 1)

    def _head_scale(self) -> Tensor | None:
        """Factors of the cosine similarity, by head (h,); None for dot products."""
        return self._scale(1).view(-1) if self.style.similarity == "cosine" else None

    def _hide(self, bias: Tensor, mask: Tensor | None) -> Tensor:
        """Position bias (h, N, N) with the mask folded in: itself, or (n·h, N, N) where there is a mask."""
        if mask is None:
            return bias
        allowed = mask[:, None]
        if self.mask_value is None:
            bias = bias.masked_fill(~allowed, float("-inf"))
        else:
            bias = torch.where(allowed, bias, bias + self.mask_value)
        return bias.flatten(0, 1)

    def offset_bias(self, tables: WindowTables) -> Tensor:
        """The position bias of every offset: (h, L)."""
        if tables.offsets is None:
            table: Tensor = self.relative_position_bias_table
        else:
            table = self.cpb_mlp(tables.offsets)
            if self.style.position_bias == "log-cpb-sigmoid":
                table = 16 * torch.sigmoid(table)
        # Heads first and contiguous: the gather's backward then adds along rows, several times faster on a CPU.
        return table.t().contiguous()


def _normalize(x: Tensor) -> Tensor:
    """Unit vectors along the last axis; the norm is taken in float32 or wider, where the guard of 1e-12 exists."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return F.normalize(x.float(), dim=-1).to(x.dtype)
    return F.normalize(x, dim=-1)
