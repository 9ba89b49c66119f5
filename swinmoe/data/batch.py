"""One micro-batch, on its way from the data set to the model.

b images, C channels, H height, W width, K classes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images with their labels; b may be 0 in evaluation, where every rank must take part in every step."""

    images: Tensor
    """(b, C, H, W) float32, normalised."""
    targets: Tensor
    """(b,) int64 class ids (of the first image of each mixed pair, where mixup is on)."""
    soft_targets: Tensor | None
    """(b, K) float32 rows that sum to 1, with label smoothing in them; None where mixup is off."""
    indices: Tensor
    """(b,) int64 positions in the data set."""

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on `device`; `non_blocking` copies overlap with compute if the batch is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory. The torch loader calls this where CUDA is present."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        soft = None if self.soft_targets is None else change(self.soft_targets)
        return Batch(change(self.images), change(self.targets), soft, change(self.indices))
