"""Keeping the best of what was evaluated and saved: is there ever such a step?"""

from __future__ import annotations

from typing import Any

import pytest

from swinmoe.config import RunConfig
from swinmoe.config.io import build
from swinmoe.train.loop import keeps_no_best


@pytest.mark.parametrize(
    ("checkpoint", "every", "inert"),
    [
        ({"keep_best": 0}, None, False),
        ({"keep_best": 1}, 1, False),
        ({"keep_best": 1}, None, True),  # at the end alone
        ({"keep_best": 1, "every_epochs": 0}, 1, True),
        ({"keep_best": 1, "every_epochs": 0, "every_steps": 3}, 1, False),  # at step 30, of 40
        ({"keep_best": 1, "every_epochs": 0, "every_steps": 7}, 1, True),  # at step 70
        ({"keep_best": 1, "every_epochs": 3}, 2, True),  # at epoch 6
        ({"keep_best": 1, "every_epochs": 2}, 0.5, False),
        ({"keep_best": 1, "every_epochs": 3, "every_steps": 5}, 2, False),
    ],
)
def test_nothing_to_choose_from(checkpoint: dict[str, Any], every: float | None, inert: bool) -> None:
    """Ten steps an epoch, four epochs."""
    run = build(RunConfig, {"name": "a", "checkpoint": checkpoint, "train": {"eval_every_epochs": every}})
    assert keeps_no_best(run, 10, 40) == inert
