"""Dynamic loss scaling: halves on overflow, doubles after enough good steps, constant elsewhere."""

from __future__ import annotations

from swinmoe.train.loss_scale import LossScale, make_loss_scale


def test_moves_by_factors_of_two() -> None:
    scale = LossScale(value=8.0, dynamic=True, growth_interval=2)
    scale.update(overflowed=True)
    assert scale.value == 4.0
    scale.update(overflowed=False)
    scale.update(overflowed=True)
    assert (scale.value, scale.good_steps) == (2.0, 0)
    for _ in range(2):
        scale.update(overflowed=False)
    assert scale.value == 4.0


def test_static_for_other_precisions() -> None:
    scale = make_loss_scale("bf16")
    scale.update(overflowed=True)
    assert scale.value == 1.0 and make_loss_scale("fp16").value == 65536.0
