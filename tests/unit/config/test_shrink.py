"""A shrunk run keeps what a recipe is about and loses its size."""

from __future__ import annotations

import pytest

from swinmoe.config import RunConfig
from swinmoe.config.io import build
from swinmoe.config.shrink import shrink


@pytest.mark.parametrize(
    ("given", "shrunk"),
    [
        (None, None),
        ([12, 0], (4, 0)),
        ([[12, 6], [3, 8]], ((4, 4), (3, 4))),
        ([2, [12, 2]], (2, (4, 2))),
    ],
)
def test_windows_of_pre_training_are_sides_or_pairs(given, shrunk):
    run = build(RunConfig, {"model": {"preset": "swin_moe_micro", "pretrained_window_sizes": given}})
    assert shrink(run).model.pretrained_window_sizes == shrunk
