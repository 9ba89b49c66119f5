"""Batches on their way to the device."""

from __future__ import annotations

from dataclasses import replace

import torch

from swinmoe.data import Batch


def place(batch: Batch, device: torch.device, precision: str) -> Batch:
    """`batch` on `device`, images in float64 for `fp64` runs; autocast decides the rest."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    soft = batch.soft_targets
    return replace(
        batch,
        images=batch.images.to(device, dtype, non_blocking=True),
        targets=batch.targets.to(device, non_blocking=True),
        soft_targets=None if soft is None else soft.to(device, dtype, non_blocking=True),
    )
