"""A trained model over a data set: predictions, where tokens went, how fast; at several capacities if asked to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from swinmoe.checkpoint import share
from swinmoe.config import CapacityPolicy
from swinmoe.data import ImageDataset, eval_batches
from swinmoe.errors import ConfigError
from swinmoe.models import SwinOutput, SwinTransformer
from swinmoe.moe import RoutingStats
from swinmoe.parallel import global_sum
from swinmoe.train.evaluate_scores import Predictions
from swinmoe.train.metrics import RoutingMeter
from swinmoe.train.opened import Opened

Tell = Callable[[int, int], None]
"""Told of (images done, images in all)."""


@dataclass(frozen=True)
class Pass:
    """One look at every image of a data set."""

    predictions: Predictions
    routing: dict[str, dict[str, Any]]
    """By expert layer; see `moe.stats.summarise`."""
    images_per_second: float
    """Forward passes alone, without loading and without the first batch (a lone batch is run twice); the sum over
    processes."""

    @property
    def routed(self) -> int:
        """Choices over all layers."""
        return sum(sum(layer["routed"]) for layer in self.routing.values())

    @property
    def dropped(self) -> int:
        """Choices that found no place."""
        return self.routed - sum(sum(layer["kept"]) for layer in self.routing.values())

    @property
    def drop_fraction(self) -> float:
        """Share of the choices, 0 for a dense model."""
        return self.dropped / self.routed if self.routed else 0.0


def look_at(opened: Opened, dataset: ImageDataset, batch_size: int, tell: Tell = lambda done, total: None) -> Pass:
    """Every image of `dataset` once, in evaluation's fixed shuffled order, `batch_size` at a time; of several processes
    each takes its part of every batch, and has what all of them found. Theirs is a collective call."""
    mesh = opened.mesh
    parts: list[Predictions] = []
    meter = RoutingMeter()
    spent, timed = 0.0, 0
    for batch in eval_batches(
        dataset, batch_size=batch_size, rank=mesh.rank, world=mesh.world, workers=opened.run.data.workers
    ):
        output, seconds = _timed(opened, batch.images)
        if parts:  # the first batch also pays for what is done once
            spent, timed = spent + seconds, timed + len(batch)
        elif len(dataset) <= batch_size:
            spent, timed = _timed(opened, batch.images)[1], len(batch)
        parts.append(Predictions.of(output.logits, batch.targets))
        meter.add(output.routing)
        tell(min(len(parts) * batch_size, len(dataset)), len(dataset))
    found = share(mesh, None, (Predictions.join(parts), timed / spent))
    routing = meter.take(partial(global_sum, mesh=mesh))
    return Pass(Predictions.join([part for part, _ in found]), routing, sum(rate for _, rate in found))


@dataclass(frozen=True)
class AtCapacity:
    """A pass with another capacity."""

    factor: float | Literal["dropless"]
    found: Pass


def sweep(
    opened: Opened,
    dataset: ImageDataset,
    batch_size: int,
    factors: list[float | Literal["dropless"]],
    tell: Callable[[float | Literal["dropless"]], Tell],
) -> list[AtCapacity]:
    """The same pass at each capacity factor (V-MoE's and Tutel's table 12: fewer slots, less work, some accuracy).

    Raises:
        ConfigError: a dense model.
    """
    if not opened.model.moe_layers():
        raise ConfigError("--capacity needs a sparse model, and this one is dense; leave it out")
    found = []
    for factor in factors:
        with at_capacity(opened.model, factor):
            found.append(AtCapacity(factor, look_at(opened, dataset, batch_size, tell(factor))))
    return found


@contextmanager
def at_capacity(model: SwinTransformer, factor: float | Literal["dropless"]) -> Iterator[None]:
    """Within it every expert layer evaluates at this capacity factor; kind (`fixed` or not) and least slots stay."""
    layers = model.moe_layers().values()
    before = [layer.cfg for layer in layers]
    try:
        for layer in layers:
            own = layer.cfg.capacity.eval
            if factor == "dropless":
                policy = CapacityPolicy(kind="dropless")
            else:
                kind: Literal["fixed", "bounded"] = "fixed" if own.kind == "fixed" else "bounded"
                policy = CapacityPolicy(kind=kind, factor=factor, min_slots=own.min_slots)
            layer.cfg = replace(layer.cfg, capacity=replace(layer.cfg.capacity, eval=policy))
        yield
    finally:
        for layer, cfg in zip(layers, before, strict=True):
            layer.cfg = cfg


@dataclass(frozen=True)
class Independence:
    """Whether an image's prediction depends on the images beside it."""

    independent: bool
    said: str


@dataclass
class Choices:
    """Of several batches: how many were made, and how many found no place."""

    routed: int = 0
    dropped: int = 0

    def add(self, routing: Mapping[str, RoutingStats]) -> None:
        """Count those of one forward pass."""
        for stats in routing.values():
            routed = int(stats.routed.sum())
            self.routed, self.dropped = self.routed + routed, self.dropped + routed - int(stats.kept.sum())


def independence(model: SwinTransformer, found: Pass | Choices, batch_size: int) -> Independence:
    """What may be said of batches: capacity is counted per batch, so where it cuts, neighbours compete for slots."""
    if not model.moe_layers():
        return Independence(True, "dense: a prediction depends on its image alone")
    policies = dict.fromkeys(layer.cfg.capacity.eval for layer in model.moe_layers().values())
    limits = [f"{policy.kind} {policy.factor:g}" for policy in policies if policy.kind != "dropless"]
    if not limits:
        return Independence(True, "dropless: a prediction depends on its image alone, whatever batch it is in")
    limit = f"capacity {', '.join(limits)} of each batch of {batch_size} images"
    if found.dropped == 0:
        return Independence(
            False,
            f"{limit} dropped nothing here, so these numbers are those of dropless; with other batches it might",
        )
    return Independence(
        False,
        f"{limit} dropped {found.dropped:,} of {found.routed:,} choices: a prediction depends on the images that share "
        "its batch, and other batch sizes give other numbers; model.moe.capacity.eval.kind=dropless has none of that",
    )


def _timed(opened: Opened, images: Tensor) -> tuple[SwinOutput, float]:
    began = _clock(opened.device)
    output = opened(images)
    return output, _clock(opened.device) - began


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
