"""Frozen features: the pooled output of a trained model, image by image.

Shapes: n images, D width of the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swinmoe.data import ImageDataset
from swinmoe.train.evaluate_model import Tell
from swinmoe.train.opened import Opened


def features_of(
    opened: Opened,
    dataset: ImageDataset,
    indices: Sequence[int],
    batch_size: int,
    tell: Tell = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """(n, D) float64 and (n,) int64 classes, on the host, of the images at `indices`, without augmentation."""
    found, targets = [], []
    for start in range(0, len(indices), batch_size):
        images, classes = dataset.batch(None, list(indices[start : start + batch_size]))
        found.append(opened(images).features.double().cpu())
        targets.append(classes)
        tell(min(start + batch_size, len(indices)), len(indices))
    return torch.cat(found), torch.cat(targets)
