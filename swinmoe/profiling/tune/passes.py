"""A model over batches at given capacities: who was recognised, how busy experts were, what was dropped.

Shapes: N images, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from swinmoe.config import CapacityPolicy
from swinmoe.data import Batch
from swinmoe.models import SwinTransformer
from swinmoe.objectives import Classification, StepResult
from swinmoe.parallel import no_sync
from swinmoe.profiling.tune.loads import Load
from swinmoe.randomness import derive_seed
from swinmoe.runtime import from_all
from swinmoe.train.opened import Opened

Mode = Literal["train", "eval"]
Factor = float | None
"""A capacity factor; None = dropless."""


@dataclass(frozen=True)
class Setting:
    """Capacities that a model can be run with."""

    factors: Mapping[str, Factor]
    """By layer."""
    batch_prioritized: bool

    def policies(self, own: Mapping[str, CapacityPolicy]) -> dict[str, CapacityPolicy]:
        """By layer; `own` are those of the model, whose kind and least slots stay."""
        return {layer: at_factor(own[layer], factor) for layer, factor in self.factors.items()}


def at_factor(own: CapacityPolicy, factor: Factor) -> CapacityPolicy:
    """`own` with another factor: fixed stays fixed, all others become bounded; None = dropless."""
    if factor is None:
        return CapacityPolicy(kind="dropless")
    kind: Literal["fixed", "bounded"] = "fixed" if own.kind == "fixed" else "bounded"
    return CapacityPolicy(kind=kind, factor=factor, min_slots=own.min_slots)


@dataclass(frozen=True)
class SeenOnce:
    """What one batch showed."""

    correct: tuple[bool, ...]
    loads: dict[str, Load]
    """By layer."""
    dropped: dict[str, int]
    """By layer, choices that found no slot, as the layer counted them."""


@dataclass(frozen=True)
class Seen:
    """What one pass over batches showed."""

    correct: tuple[bool, ...]
    """(N,) whether each image was recognised."""
    loads: dict[str, list[Load]]
    """By layer, batch after batch."""
    dropped: dict[str, int]
    """By layer, choices that found no slot."""

    @classmethod
    def of(cls, batches: Sequence[SeenOnce]) -> Seen:
        """Batches taken together; those without images (a batch smaller than the number of processes) show nothing."""
        seen = [batch for batch in batches if batch.correct]
        return cls(
            tuple(right for batch in seen for right in batch.correct),
            {layer: [batch.loads[layer] for batch in seen] for layer in batches[0].loads},
            {layer: sum(batch.dropped[layer] for batch in seen) for layer in batches[0].loads},
        )

    @property
    def accuracy(self) -> float:
        """Share of the images recognised."""
        return sum(self.correct) / len(self.correct)

    @property
    def drops(self) -> dict[str, float]:
        """By layer, share of its choices dropped."""
        choices = {layer: sum(load.choices for load in loads) for layer, loads in self.loads.items()}
        return {layer: count / choices[layer] for layer, count in self.dropped.items()}

    @property
    def drop_fraction(self) -> float:
        """Share of all choices dropped."""
        return sum(self.dropped.values()) / sum(load.choices for loads in self.loads.values() for load in loads)


class Workbench:
    """A trained model and the batches that it is tried on, in training or in evaluation mode.

    In training mode dropout, drop path and gate noise are drawn, the same for a batch at every setting. Where several
    processes share a model, each has its own batches, and `look` and `step` are collective calls.
    """

    def __init__(self, opened: Opened, mode: Mode, batches: Sequence[Batch]) -> None:
        self.opened, self.mode, self.batches = opened, mode, tuple(batches)
        self.model: SwinTransformer = opened.model
        self.layers = self.model.moe_layers()
        self.own = {name: getattr(layer.cfg.capacity, mode) for name, layer in self.layers.items()}
        self._objective = Classification(label_smoothing=opened.run.train.label_smoothing)

    @property
    def batch_prioritized(self) -> bool:
        """The model's own priority."""
        return next(iter(self.layers.values())).cfg.router.batch_prioritized

    def own_setting(self) -> Setting:
        """The capacities that the model has."""
        factors = {name: None if policy.kind == "dropless" else policy.factor for name, policy in self.own.items()}
        return Setting(factors, self.batch_prioritized)

    def uniform(self, factor: Factor, batch_prioritized: bool | None = None) -> Setting:
        """One factor for all layers."""
        priority = self.batch_prioritized if batch_prioritized is None else batch_prioritized
        return Setting(dict.fromkeys(self.layers, factor), priority)

    @torch.no_grad()
    def look(self, setting: Setting) -> Seen:
        """All batches once at `setting`, those of all processes, step by step. What each layer dropped is held against
        `Load.dropped`."""
        policies = setting.policies(self.own)
        with self.at(setting):
            own = [self._look_at(number, batch, policies) for number, batch in enumerate(self.batches)]
        of_ranks = from_all(own) if self.opened.mesh.world > 1 else [own]
        return Seen.of([batch for step in zip(*of_ranks, strict=True) for batch in step])

    def _look_at(self, number: int, batch: Batch, policies: Mapping[str, CapacityPolicy]) -> SeenOnce:
        output = self.model(self._images(number, batch))
        correct = (output.logits.argmax(-1).cpu() == batch.targets.cpu()).tolist()
        loads: dict[str, Load] = {}
        dropped: dict[str, int] = {}
        for name, stats in output.routing.items():
            load = loads[name] = Load(tuple(stats.routed.tolist()), int(stats.tokens), self.layers[name].top_k)
            dropped[name] = load.choices - int(stats.kept.sum())
            assert dropped[name] == load.dropped(policies[name]), (name, number, dropped, load, policies[name])
        return SeenOnce(tuple(correct), loads, dropped)

    def step(self, setting: Setting) -> None:
        """What is timed: the first batch forward at `setting`, in training backward too; no optimiser, and no sum of
        gradients over ranks."""
        with self.at(setting), torch.set_grad_enabled(self.mode == "train"), no_sync(self.model):
            batch = self.batches[0]
            images = self._images(0, batch)
            if self.mode == "eval":
                self.model(images)
                return
            targets = batch.targets.to(images.device)
            result: StepResult = self._objective(self.model, replace(batch, images=images, targets=targets))
            (result.loss_sum / len(batch) + result.aux_loss).backward()

    @contextmanager
    def at(self, setting: Setting) -> Iterator[None]:
        """Within it the model has these capacities, this mode, and in training gradients."""
        before = {name: layer.cfg for name, layer in self.layers.items()}
        trainable = [p for p in self.model.parameters() if p.is_floating_point()]
        try:
            for name, policy in setting.policies(self.own).items():
                cfg = before[name]
                changed: dict[str, Any] = {self.mode: policy}
                self.layers[name].cfg = replace(
                    cfg,
                    capacity=replace(cfg.capacity, **changed),
                    router=replace(cfg.router, batch_prioritized=setting.batch_prioritized),
                )
            self.model.train(self.mode == "train").requires_grad_(self.mode == "train")
            with self.opened.autocast():
                yield
        finally:
            for name, layer in self.layers.items():
                layer.cfg = before[name]
            self.model.eval().requires_grad_(False)
            assert all(not p.requires_grad for p in trainable)

    def forget_gradients(self) -> None:
        """Free what `step` has summed up."""
        self.model.zero_grad(set_to_none=True)

    def _images(self, number: int, batch: Batch) -> torch.Tensor:
        """On the model's device and in its type, with every draw of the coming pass keyed by the batch's number among
        those of all processes."""
        mesh = self.opened.mesh
        key = ("tune", self.opened.run.seed, number * mesh.world + mesh.rank)
        torch.manual_seed(derive_seed(*key))
        for name, layer in self.layers.items():
            layer.seed_noise(derive_seed(*key, name))
        weight = next(self.model.parameters())
        return batch.images.to(weight.device, weight.dtype)
