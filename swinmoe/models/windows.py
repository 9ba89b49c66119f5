"""Window geometry: which window a map gets, how it is padded and shifted, and which tokens may see each other.

Shapes: H, W map in tokens; wh, ww window; sh, sw shift; P padded length of an axis; n windows per map; N = wh·ww.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Pair = tuple[int, int]
SmallMap = Literal["shrink", "pad"]
PadKeys = Literal["mask", "attend"]


@dataclass(frozen=True)
class WindowGrid:
    """How one map is cut into windows: padded at the bottom and right, *then* shifted cyclically up and left.

    Padding before the shift keeps the wrap-around seam between regions that the mask tells apart. Shifting first and
    padding after (timm #2438) lets tokens of opposite edges meet where the map is no multiple of the window.
    """

    size: Pair
    """(H, W) of the map."""
    window: Pair
    shift: Pair
    """(0, 0) in unshifted blocks."""

    @property
    def padding(self) -> Pair:
        """Rows added at the bottom and columns added at the right."""
        (h, w), (wh, ww) = self.size, self.window
        return -h % wh, -w % ww

    @property
    def padded(self) -> Pair:
        return self.size[0] + self.padding[0], self.size[1] + self.padding[1]

    @property
    def counts(self) -> Pair:
        """Windows along each axis."""
        return self.padded[0] // self.window[0], self.padded[1] // self.window[1]

    @property
    def num_windows(self) -> int:
        return self.counts[0] * self.counts[1]

    @property
    def area(self) -> int:
        """N, tokens in a window."""
        return self.window[0] * self.window[1]


def fit_window(size: Pair, window: Pair, *, square: bool, small_map: SmallMap) -> Pair:
    """The window in force on a map of `size`.

    `shrink` takes the map's extent where that is below the window: Microsoft's code takes the shorter side for both
    axes of a `square` window; rectangular windows shrink axis by axis. `pad` keeps the window and pads the map.
    """
    if small_map == "pad":
        return window
    if square:
        side = min(*size, *window)
        return side, side
    return min(size[0], window[0]), min(size[1], window[1])


def window_grid(size: Pair, window: Pair, *, shifted: bool, square: bool, small_map: SmallMap) -> WindowGrid:
    """The grid of a block; a shift is half a window, and 0 where nothing would be gained by it.

    With `shrink` and a `square` window that covers the shorter side, neither axis is shifted (Microsoft's rule, kept
    for its checkpoints). Otherwise an axis is shifted unless a single window spans it.
    """
    window = fit_window(size, window, square=square, small_map=small_map)
    unshifted = WindowGrid(size, window, (0, 0))
    if not shifted or (small_map == "shrink" and square and min(size) <= window[0]):
        return unshifted
    shift = tuple(w // 2 if n > 1 else 0 for w, n in zip(window, unshifted.counts, strict=True))
    return WindowGrid(size, window, (shift[0], shift[1]))


def attention_mask(grid: WindowGrid, pad_keys: PadKeys, device: torch.device | None = None) -> Tensor | None:
    """Which pairs of a window may attend to each other: (n, N, N) bool, True = yes; None where all may.

    Tokens of a shifted window that come from opposite edges of the map do not see each other, nor, with
    `pad_keys="mask"`, do real tokens see padding. Padding sees padding, so that no row of the softmax is empty.
    """
    hides_padding = pad_keys == "mask" and grid.padding != (0, 0)
    if grid.shift == (0, 0) and not hides_padding:
        return None
    wrapped, real = [], []
    for length, padded, shift in zip(grid.size, grid.padded, grid.shift, strict=True):
        rolled = torch.arange(padded, device=device)
        wrapped.append(rolled >= padded - shift)
        real.append((rolled + shift) % padded < length)
    # Only the last window along an axis holds wrapped and other tokens, so "wrapped or not" tells regions apart.
    region = wrapped[0][:, None] * 2 + wrapped[1][None, :]
    if hides_padding:
        region = torch.where(real[0][:, None] & real[1][None, :], region, 4)
    (rows, cols), (wh, ww) = grid.counts, grid.window
    region = region.view(rows, wh, cols, ww).transpose(1, 2).reshape(grid.num_windows, grid.area)
    return region[:, :, None] == region[:, None, :]
