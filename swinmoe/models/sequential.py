"""Sequential self-attention (Swin V2, Liu et al. 2022, §3.4): windows chunk by chunk, each computed again in backward.

Shapes: B images, (H, W) padded and shifted map, D width, h heads, windows of N tokens in `rows` × `cols` per image.

At once, a layer holds the scores of all its windows, N/d times a query map for heads of width d, and keeps their
softmax for the backward pass. In a row, a chunk's scores are all there is; but ordinary autograd would keep those of
every chunk, and save nothing in training. So a chunk keeps its part of queries, keys and values, which are views of one
map, and the backward pass makes its scores anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from swinmoe.models.windows import WindowGrid

if TYPE_CHECKING:
    from swinmoe.models.attention import WindowTables

Attend = Callable[[Tensor, Tensor, "WindowTables"], Tensor]


def attend_in_chunks(
    attend: Attend, chunks: int, qkv: Tensor, bias: Tensor, tables: WindowTables, *, draws: bool
) -> Tensor:
    """`attend` on chunks of windows, one after the other.

    Args:
        attend: (b, H', W, 3·D), (h, L), tables of that part of the map -> (b, H', W, D).
        chunks: how many; fewer where there are not as many rows of windows, over all images.
        qkv: (B, H, W, 3·D).
        bias: (h, L) position bias of each offset.
        tables: of the map.
        draws: `attend` draws random numbers, which the second time must be the same.

    Returns:
        (B, H, W, D).
    """
    parts = []
    for images, rows in _parts(qkv.shape[0], tables.grid.counts[0], chunks):
        height = tables.grid.window[0]
        strip = qkv[images, rows.start * height : rows.stop * height]
        own = _tables_of(tables, rows)
        if torch.is_grad_enabled():
            part = checkpoint(attend, strip, bias, own, use_reentrant=False, preserve_rng_state=draws)
        else:
            part = attend(strip, bias, own)
        parts.append((images, part))
    # Strips of one image, or one run of images, lie side by side.
    runs: dict[tuple[int, int], list[Tensor]] = {}
    for images, part in parts:
        runs.setdefault((images.start, images.stop), []).append(part)
    return torch.cat([torch.cat(strips, dim=1) if len(strips) > 1 else strips[0] for strips in runs.values()])


def _parts(images: int, rows: int, chunks: int) -> Iterator[tuple[slice, slice]]:
    """At most `chunks` parts: whole rows of windows of all images, and if these are too few, of fewer images."""
    by_rows = min(rows, chunks)
    by_images = max(1, min(images, -(-chunks // by_rows)))  # a rank may have no image
    for some in _evenly(images, by_images):
        for few in _evenly(rows, by_rows):
            yield some, few


def _evenly(length: int, parts: int) -> Iterator[slice]:
    for number in range(parts):
        yield slice(length * number // parts, length * (number + 1) // parts)


def _tables_of(tables: WindowTables, rows: slice) -> WindowTables:
    """The tables of some rows of windows. What is cut from a map that is padded and shifted is neither."""
    grid = tables.grid
    size = ((rows.stop - rows.start) * grid.window[0], grid.padded[1])
    mask = None if tables.mask is None else tables.mask[rows.start * grid.counts[1] : rows.stop * grid.counts[1]]
    return replace(tables, grid=WindowGrid(size, grid.window, (0, 0)), mask=mask)
