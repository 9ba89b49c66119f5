"""Evaluation on all ranks: every sample once, sums reduced, numbers the same on every rank."""

from __future__ import annotations

from typing import Any

import torch

from swinmoe.data import ImageDataset, eval_batches
from swinmoe.objectives import Classification
from swinmoe.train.arm import Arm
from swinmoe.train.metrics import RoutingMeter
from swinmoe.train.place import place


@torch.no_grad()
def evaluate(arm: Arm, dataset: ImageDataset, batch_size: int, workers: int = 0) -> dict[str, Any]:
    """Loss (cross entropy without smoothing), accuracy, sample count and routing of `arm` on a data set.

    All ranks must call it: expert-parallel layers exchange tokens, so each rank sees the same number of batches, the
    last ones possibly empty.
    """
    model = arm.evaluated().eval()
    objective, meter = Classification(), RoutingMeter()
    total = torch.zeros(3, dtype=torch.float64, device=arm.device)
    for batch in eval_batches(
        dataset, batch_size=batch_size, rank=arm.mesh.rank, world=arm.mesh.world, workers=workers
    ):
        batch = place(batch, arm.device, arm.run.train.precision)
        with arm.autocast():
            result = objective(model, batch)
        total += torch.stack([result.loss_sum.double(), result.correct.double(), total.new_tensor(len(batch.targets))])
        meter.add(result.routing)
    loss, correct, samples = arm.reduce(total).tolist()
    return {
        "loss": loss / samples,
        "accuracy": correct / samples,
        "count": int(samples),
        "routing": meter.take(arm.reduce),
        "weights": "model" if arm.average is None else "ema",
    }
