"""Fitting weights to a model of another window, image, number of channels or of classes.

Shapes: L offsets of a window, h heads; D width; C channels; positions (1, H·W, D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

from swinmoe.errors import CheckpointError
from swinmoe.models.position import num_offsets, resize_image, resize_table

Pair = tuple[int, int]


def bias_table(table: Tensor, old: Pair, new: Pair) -> tuple[Tensor, str]:
    """A table (L, h) of relative positions for another window: cut where that is smaller, else bicubic."""
    how = "centre" if new[0] <= old[0] and new[1] <= old[1] else "bicubic"
    return resize_table(_wide(table), old, new), f"bias table of window {_by(old)} -> {_by(new)}, {how}"


def table_window(table: Tensor, known: Pair | None) -> Pair | None:
    """The window of a table (L, h): the one known, or the square one; None where it cannot be told."""
    if known is not None and num_offsets(known) == table.shape[0]:
        return known
    side = math.isqrt(table.shape[0])
    return ((side + 1) // 2,) * 2 if side * side == table.shape[0] and side % 2 else None


def positions(embedding: Tensor, new: Pair, known: Pair | None = None) -> tuple[Tensor, str] | None:
    """Absolute positions for another grid, bicubic; None where the old one is neither `known` nor square."""
    side = math.isqrt(embedding.shape[1])
    old = known if known is not None and known[0] * known[1] == embedding.shape[1] else (side, side)
    if old[0] * old[1] != embedding.shape[1]:
        return None
    image = _wide(embedding).view(1, *old, -1).permute(0, 3, 1, 2)
    resized = resize_image(image, new).permute(0, 2, 3, 1).flatten(1, 2).contiguous()
    return resized, f"positions {_by(old)} -> {_by(new)}, bicubic"


def channels(kernel: Tensor, count: int) -> tuple[Tensor, str] | None:
    """Kernels (D, C, ...) for `count` channels: summed for one; for more, repeated and shared out.

    Each old channel's weights are divided by the number of its copies, so that an image whose channels repeat gives
    what it gave before; and a grey one what its three equal channels did. Fewer channels, but for one: None.
    """
    old = kernel.shape[1]
    if count == 1:
        return kernel.sum(1, keepdim=True), f"{old} channels summed to 1"
    if count < old:
        return None
    source = torch.arange(count) % old
    copies = torch.bincount(source, minlength=old)[source].to(kernel.dtype)
    shared = kernel[:, source] / copies.view(1, -1, *(1,) * (kernel.dim() - 2))
    return shared, f"{old} channels repeated to {count}"


def read_class_map(given: str | Path | Sequence[int], old: int, new: int) -> list[int]:
    """For each of the `new` classes its index among the `old` ones; a file has one index a line.

    Raises:
        CheckpointError: unreadable, another number of indices, one that is no whole number, or one out of range.
    """
    if isinstance(given, str | Path):
        try:
            indices = [int(line) for line in Path(given).read_text().split()]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"class map {str(given)!r} is no file of one index a line: {error}") from error
    else:
        strange = [index for index in given if isinstance(index, bool) or not isinstance(index, Integral)]
        if strange:
            raise CheckpointError(
                f"the class map holds {strange[0]!r}; give whole numbers, for each class its index in the source"
            )
        indices = [int(index) for index in given]
    if len(indices) != new or not all(0 <= index < old for index in indices):
        raise CheckpointError(
            f"the class map has {len(indices)} indices between {min(indices, default=0)} and "
            f"{max(indices, default=0)}; the model's {new} classes need {new} of them, each below the source's {old}"
        )
    return indices


def _wide(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by(pair: Pair) -> str:
    return f"{pair[0]}x{pair[1]}"
