"""Relative positions inside a window: the index into a table of offsets, and the log-spaced coordinates of offsets.

Shapes: window (wh, ww), N = wh·ww tokens in row-major order, L = (2·wh - 1)·(2·ww - 1) offsets, h heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def num_offsets(window: Pair) -> int:
    """L, the number of different offsets between two tokens of a window."""
    return (2 * window[0] - 1) * (2 * window[1] - 1)


def relative_index(window: Pair, table_window: Pair, device: torch.device | None = None) -> Tensor:
    """Where each (query, key) pair of `window` finds its offset in a table made for `table_window`: (N·N,) int64.

    Entry (q, k) points at offset (y_q - y_k, x_q - x_k). A window smaller than the table's reads the table's centre, so
    that equal offsets get equal biases.
    """
    (th, tw), (wh, ww) = table_window, window
    y = torch.arange(wh, device=device).repeat_interleave(ww)
    x = torch.arange(ww, device=device).repeat(wh)
    dy = y[:, None] - y[None, :] + th - 1
    dx = x[:, None] - x[None, :] + tw - 1
    return (dy * (2 * tw - 1) + dx).flatten()


def log_offsets(window: Pair, reference: Pair, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Log-spaced offsets in the order of `relative_index`'s table: (L, 2), the input of the position-bias MLP.

    sign(d)·log2(1 + 8|d|/(r - 1)) / log2(8) for an offset d along an axis whose reference window is r (Liu et al. 2022,
    eq. 4; the factor 8 and the base as in its code). `reference` is the window of pre-training, which keeps the bias a
    function of the offset when the window changes. A window of one has the single offset 0.
    """
    axes = []
    for length, ref in zip(window, reference, strict=True):
        offset = torch.arange(1 - length, length, device=device, dtype=torch.float64) * (8 / max(ref - 1, 1))
        axes.append(offset.sign() * torch.log2(1 + offset.abs()) / 3)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1).to(dtype)


def resize_table(table: Tensor, old: Pair, new: Pair) -> Tensor:
    """A bias table (L_old, h) made for window `old`, for window `new`: (L_new, h).

    Where the new window fits into the old one the centre is cut out, which changes no bias of an offset that remains;
    otherwise the table is interpolated bicubically as an image, as Microsoft's loader does.
    """
    if old == new:
        return table
    image = table.t().reshape(1, -1, 2 * old[0] - 1, 2 * old[1] - 1)
    if new[0] <= old[0] and new[1] <= old[1]:
        dy, dx = old[0] - new[0], old[1] - new[1]
        image = image[:, :, dy : dy + 2 * new[0] - 1, dx : dx + 2 * new[1] - 1]
    else:
        image = resize_image(image, (2 * new[0] - 1, 2 * new[1] - 1))
    return image.flatten(2)[0].t().contiguous()


def resize_image(image: Tensor, size: Pair) -> Tensor:
    """(B, C, H, W) to (B, C, *size) bicubically, without antialiasing."""
    return F.interpolate(image, size=size, mode="bicubic", align_corners=False)
