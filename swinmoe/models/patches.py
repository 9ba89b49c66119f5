"""Image to patches, and 2x2 patches to one. Shapes: images (B, C, Y, X); maps (B, H, W, D), channels last."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from swinmoe.models.layers import linear, patch_conv


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected to `dim`; edges that fill no patch are padded with zeros."""

    def __init__(self, patch_size: tuple[int, int], in_chans: int, dim: int, *, norm: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = patch_conv(in_chans, dim, patch_size)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> (B, ceil(Y/p), ceil(X/p), D)."""
        (ph, pw), (height, width) = self.patch_size, images.shape[-2:]
        if height % ph or width % pw:
            images = F.pad(images, (0, -width % pw, 0, -height % ph))
        x: Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return x


class PatchMerging(nn.Module):
    """2x2 neighbours concatenated to 4D and reduced to 2D; an odd last row or column is paired with zeros.

    The norm stands over 4D before the reduction (Swin V1) or over 2D after it (V2). Neighbours are concatenated in the
    order (row, column) = (0,0), (1,0), (0,1), (1,1), on which published weights depend.
    """

    def __init__(self, dim: int, *, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm = nn.LayerNorm(4 * dim if norm_first else 2 * dim)
        self.reduction = linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, ceil(H/2), ceil(W/2), 2D)."""
        batch, height, width, dim = x.shape
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        rows, cols = (height + 1) // 2, (width + 1) // 2
        x = x.view(batch, rows, 2, cols, 2, dim).permute(0, 1, 3, 4, 2, 5).reshape(batch, rows, cols, 4 * dim)
        if self.norm_first:
            x = self.reduction(self.norm(x))
        else:
            x = self.norm(self.reduction(x))
        return x
