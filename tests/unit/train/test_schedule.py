"""Learning rates against values worked out by hand, and timm's scheduler as an independent oracle."""

from __future__ import annotations

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from swinmoe.config import OptimConfig, ScheduleConfig, TrainConfig
from swinmoe.errors import ConfigError
from swinmoe.train.schedule import Length, make_learning_rate, planned_steps


@pytest.mark.parametrize("prefix", [True, False])
def test_equals_timm(prefix: bool) -> None:
    steps, warmup = 50, 10
    optim = OptimConfig(base_lr=1.25e-4, lr_batch=512)
    rate = make_learning_rate(
        optim,
        ScheduleConfig(warmup_steps=warmup, warmup_lr=1.25e-7, min_lr=1.25e-6, warmup_prefix=prefix),
        TrainConfig(steps=steps, batch_size=4096),
        Length(steps=steps),
        steps_per_epoch=5,
    )
    assert rate.peak == pytest.approx(1e-3) and rate.floor == pytest.approx(1e-5)
    theirs = CosineLRScheduler(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3),
        t_initial=steps - warmup if prefix else steps,
        lr_min=1e-5,
        warmup_lr_init=1e-6,
        warmup_t=warmup,
        warmup_prefix=prefix,
        t_in_epochs=False,
    )
    for step in range(steps):
        assert rate.at(step) == pytest.approx(theirs._get_lr(step)[0], rel=1e-9), step


def test_no_scaling_by_default_and_ends() -> None:
    rate = make_learning_rate(
        OptimConfig(base_lr=0.01),
        ScheduleConfig(min_lr=0.001),
        TrainConfig(steps=10, batch_size=999),
        Length(steps=10),
        5,
    )
    assert (
        rate.at(0) == pytest.approx(0.01)
        and rate.at(5) == pytest.approx(0.0055)
        and rate.at(10) == pytest.approx(0.001)
    )


def test_schedule_over_seconds() -> None:
    length = Length(seconds=10.0)
    rate = make_learning_rate(OptimConfig(base_lr=1.0), ScheduleConfig(), TrainConfig(steps=7), length, 5)
    assert rate.at(3, 5.0) == pytest.approx(0.5)
    assert not length.done(10**6, 9.9) and length.done(1, 10.0)


def test_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="warm-up takes 50 steps but the run only 10"):
        make_learning_rate(OptimConfig(), ScheduleConfig(warmup_epochs=10), TrainConfig(steps=10), Length(steps=10), 5)


def test_planned_steps() -> None:
    assert planned_steps(TrainConfig(epochs=2.5), 10) == 25
    assert planned_steps(TrainConfig(epochs=2.5, steps=3), 10) == 3
