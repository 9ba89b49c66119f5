"""What experts look at: patches coloured by expert, and how experts divide the classes among them.

Shapes: B images, (h, w) the stage's map, T = B·h·w tokens, K choices, E experts, L classes.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from swinmoe.data import eval_batches
from swinmoe.models.stage import stage_map
from swinmoe.train import Arm, Job
from swinmoe.train.place import place


@torch.no_grad()
def write_routing_pictures(job: Job, arm: Arm, sample_images: int) -> None:
    """Write `class_expert` and `samples` records for every expert layer of a trained arm, over the evaluation set.

    All ranks take part (experts may be spread); the main one writes.
    """
    layers = arm.raw.moe_layers()
    if not layers:
        return
    model = arm.evaluated().eval()
    classes = job.bundle.num_classes
    experts = arm.run.model.moe.num_experts if arm.run.model.moe else 0
    tables = {name: torch.zeros(classes, experts, dtype=torch.float64, device=arm.device) for name in layers}
    batches = eval_batches(
        job.bundle.eval, batch_size=job.run.train.eval_batch_size, rank=arm.mesh.rank, world=arm.mesh.world
    )
    for batch in batches:
        batch = place(batch, arm.device, arm.run.train.precision)
        with arm.autocast():
            output = model(batch.images)
        for name, stats in output.routing.items():
            tables[name] += class_expert_table(stats.expert_ids, batch.targets, classes, experts)
    # The pictures are made from the same few images on every rank, so that all take part in the exchange.
    wanted = _spread_over_classes(job, sample_images)
    images = torch.stack([job.bundle.eval.sample(None, index)[0] for index in wanted])
    dtype = torch.float64 if arm.run.train.precision == "fp64" else torch.float32
    with arm.autocast():
        output = model(images.to(arm.device, dtype))
    predictions = output.logits.argmax(dim=-1).tolist()
    owner = {"arm": arm.name, "seed": arm.run.seed, "step": arm.step, "class_names": list(job.bundle.class_names)}
    for name in layers:
        table = arm.reduce(tables[name].reshape(-1)).reshape(classes, experts)
        job.records.write("class_expert", **owner, layer=name, table=table.long().tolist())
        height, width = stage_map(arm.run.model, _stage(name))
        grids = output.routing[name].expert_ids[:, 0].reshape(len(wanted), height, width).tolist()
        pictures = [_picture(job, *item) for item in zip(wanted, predictions, grids, strict=True)]
        job.records.write("samples", **owner, layer=name, images=pictures)


def class_expert_table(expert_ids: Tensor, targets: Tensor, classes: int, experts: int) -> Tensor:
    """(L, E) float64: tokens of each class that each expert was first choice for; dropped tokens do not count.

    Args:
        expert_ids: (T, K), images one after the other, -1 where dropped.
        targets: (B,) class of each image.
    """
    if not len(targets):
        return torch.zeros(classes, experts, dtype=torch.float64, device=targets.device)
    first = expert_ids[:, 0].reshape(len(targets), -1)
    cell = targets.unsqueeze(1) * experts + first
    return torch.bincount(cell[first >= 0], minlength=classes * experts).double().reshape(classes, experts)


def _stage(layer: str) -> int:
    """Stage of an expert layer from its name, `layers.<stage>.blocks.<block>.mlp`."""
    return int(layer.split(".")[1])


def _spread_over_classes(job: Job, wanted: int) -> list[int]:
    """Indices of about `wanted` evaluation images, the classes taking turns."""
    targets = np.asarray(job.bundle.eval.targets)
    by_class = [np.flatnonzero(targets == c) for c in range(job.bundle.num_classes)]
    order = [int(rows[turn]) for turn in range(wanted) for rows in by_class if turn < len(rows)]
    return sorted(order[:wanted])


def _picture(job: Job, index: int, prediction: int, grid: list[list[int]]) -> dict[str, Any]:
    image = job.bundle.eval.image(index)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image).squeeze())
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return {
        "index": index,
        "label": int(job.bundle.eval.targets[index]),
        "prediction": prediction,
        "png": base64.b64encode(buffer.getvalue()).decode(),
        "experts": grid,
    }
