"""Phases lie end to end: with a clock that ticks once per look, every tick between borders has one place."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from swinmoe.config import MoEConfig, ParallelConfig
from swinmoe.moe import MoEMlp, phases
from swinmoe.parallel import make_mesh
from swinmoe.profiling.breakdown import Watched, in_exchange, mean_breakdown
from swinmoe.profiling.clock import Timing
from swinmoe.profiling.timeline import Timeline, watch


def ticking() -> Timeline:
    ticks = count()
    return Timeline(lambda: next(ticks), lambda start, end: float(end - start))


def test_times_between_borders_add_up_to_the_whole() -> None:
    timeline = ticking()
    layer = MoEMlp(MoEConfig(num_experts=4, top_k=2), dim=8, hidden_dim=16)
    x = torch.randn(12, 8, requires_grad=True)
    with phases.listen(timeline):
        y, stats = layer(x)
        phases.turn(phases.BACKWARD)
        torch.autograd.backward([y.sum(), stats.loss])
        timeline.close()
    taken = timeline.read()
    slices = timeline.slices()
    assert sum(sum(own.values()) for own in taken.values()) == slices[-1][3] - slices[0][2] == len(slices)
    assert taken["forward"] == dict.fromkeys(phases.LAYER_PHASES, 1.0) | {"other": 3.0}
    assert taken["backward"] == dict.fromkeys(phases.LAYER_PHASES, 1.0) | {"other": 2.0}
    assert in_exchange(taken) == 4.0


def test_a_step_is_watched_by_the_clock() -> None:
    taken = watch(lambda: phases.enter("experts")).read()
    assert set(taken["forward"]) == {"other", "experts"} and all(ms >= 0 for ms in taken["forward"].values())


class _Recorded(Watched):
    """Timelines as given."""

    def __init__(self, experts: list[float]) -> None:
        super().__init__(lambda: None)
        for ms in experts:
            times = iter([0.0, 1.0, 1.0 + ms])
            timeline = Timeline(lambda times=times: next(times), lambda start, end: end - start)  # type: ignore[misc]
            timeline.crossed("forward", "other")
            timeline.crossed("forward", "experts")
            timeline.close()
            self.timelines.append(timeline)


def test_the_breakdown_is_of_the_middle_half_of_the_rounds() -> None:
    """Of eight rounds the two fastest and the two slowest are left out, and the warm-up before them."""
    experts = [999.0, 999.0, 1.0, 80.0, 4.0, 5.0, 90.0, 3.0, 6.0, 2.0]
    timing = Timing(tuple(ms + 1 for ms in experts[2:]))
    found = mean_breakdown(_Recorded(experts), timing, make_mesh(ParallelConfig()))
    assert found["forward"]["experts"] == pytest.approx((3 + 4 + 5 + 6) / 4)
    assert found["forward"]["other"] == pytest.approx(1.0)
    assert found["forward"]["route"] == 0.0
