"""Image classification: cross entropy on labels, smoothed or mixed.

Shapes: B images on this rank, L classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinmoe.data import Batch
from swinmoe.moe.types import RoutingStats


@dataclass(frozen=True)
class StepResult:
    """What one forward pass yields. Sums over this rank's images, so that micro-batches and ranks add up."""

    loss_sum: Tensor
    """() task loss summed over images, differentiable."""
    aux_loss: Tensor
    """() balance loss of this forward pass, differentiable; 0 for a dense model."""
    correct: Tensor
    """() int64: images whose most likely class is the label (the original one under mixup)."""
    routing: dict[str, RoutingStats]
    """Per expert layer."""


@dataclass(frozen=True)
class Classification:
    """Cross entropy. `label_smoothing` applies to hard labels; mixed targets come smoothed from the loader."""

    label_smoothing: float = 0.0

    def __call__(self, model: nn.Module, batch: Batch) -> StepResult:
        """Forward `batch` through `model` (which returns a `SwinOutput`); the loss is taken in float32 or wider."""
        output = model(batch.images)
        logits = output.logits.float() if output.logits.dtype in (torch.bfloat16, torch.float16) else output.logits
        if batch.soft_targets is not None:
            loss = -(batch.soft_targets.to(logits.dtype) * F.log_softmax(logits, dim=-1)).sum()
        else:
            loss = F.cross_entropy(logits, batch.targets, reduction="sum", label_smoothing=self.label_smoothing)
        correct = (logits.detach().argmax(dim=-1) == batch.targets).sum()
        return StepResult(loss_sum=loss, aux_loss=output.aux_loss, correct=correct, routing=output.routing)
