"""Frozen features: the pooled output of a trained model, image by image.

Shapes: n images, D width of the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swinmoe.data import ImageDataset
from swinmoe.train.evaluate_model import Choices, Tell
from swinmoe.train.opened import Opened


def features_of(
    opened: Opened,
    dataset: ImageDataset,
    indices: Sequence[int],
    batch_size: int,
    tell: Tell = lambda done, total: None,
    choices: Choices | None = None,
) -> tuple[Tensor, Tensor]:
    """(n, D) float64 and (n,) int64 classes, on the host, of the images at `indices`, without augmentation; `choices`
    counts what experts were asked for."""
    found, targets = [], []
    for start in range(0, len(indices), batch_size):
        images, classes = dataset.batch(None, list(indices[start : start + batch_size]))
        output = opened(images)
        found.append(output.features.double().cpu())
        if choices is not None:
            choices.add(output.routing)
        targets.append(classes)
        tell(min(start + batch_size, len(indices)), len(indices))
    return torch.cat(found), torch.cat(targets)
