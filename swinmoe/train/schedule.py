"""Learning rate over a run: linear warm-up, then half a cosine.

An arm's length is a number of steps, or a number of seconds of its own step time; the cosine spans either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from swinmoe.config import OptimConfig, ScheduleConfig, TrainConfig
from swinmoe.errors import ConfigError
from swinmoe.train.optim import rate_scale


@dataclass(frozen=True)
class Length:
    """How long an arm trains: `steps`, or until `seconds` of its own step time are spent."""

    steps: int | None = None
    seconds: float | None = None

    def done(self, step: int, seconds: float) -> bool:
        """True once `step` optimiser steps, or `seconds`, are enough."""
        return step >= self.steps if self.steps is not None else seconds >= (self.seconds or 0.0)

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is over, 0 to 1."""
        share = step / max(1, self.steps) if self.steps is not None else seconds / (self.seconds or 1.0)
        return min(1.0, share)


def planned_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Optimiser steps of a run: `train.steps`, or epochs times steps per epoch."""
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None  # TrainConfig refuses both being None
    return max(1, round(train.epochs * steps_per_epoch))


@dataclass(frozen=True)
class LearningRate:
    """Peak, floor and warm-up of one run, all already scaled by the batch."""

    peak: float
    floor: float
    warmup_from: float
    warmup_steps: int
    prefix: bool
    length: Length

    def at(self, step: int, seconds: float = 0.0) -> float:
        """The rate of 0-based optimiser step `step`, `seconds` into the arm's own step time."""
        if step < self.warmup_steps:
            return self.warmup_from + (self.peak - self.warmup_from) * step / self.warmup_steps
        if self.prefix and self.length.steps is not None:
            share = (step - self.warmup_steps) / max(1, self.length.steps - self.warmup_steps)
        else:
            share = self.length.progress(step, seconds)
        return self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def make_learning_rate(
    optim: OptimConfig, schedule: ScheduleConfig, train: TrainConfig, length: Length, steps_per_epoch: int
) -> LearningRate:
    """The learning rate of a run; `ConfigError` if the warm-up is longer than the run."""
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if length.steps is not None and warmup > length.steps:
        raise ConfigError(
            f"the warm-up takes {warmup} steps but the run only {length.steps}; shorten schedule.warmup_epochs or "
            "schedule.warmup_steps, or train longer"
        )
    scale = rate_scale(optim, train.batch_size)
    return LearningRate(
        peak=optim.base_lr * scale,
        floor=schedule.min_lr * scale,
        warmup_from=schedule.warmup_lr * scale,
        warmup_steps=warmup,
        prefix=schedule.warmup_prefix,
        length=length,
    )
