"""Calibration on two processes: messages and work side by side become figures too, the same on both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pool import Pool

from swinmoe.config import ParallelConfig
from swinmoe.parallel import make_mesh
from swinmoe.profiling.plan import calibrate as module

pytestmark = pytest.mark.distributed


def figures() -> tuple[int, float, float, list[tuple[int, float]], str, str]:
    """Processes of a node, the link's bandwidth, its latency, the slowdown of so many processes; what links are."""
    module.SHAPES = ((4608, 1536, 384), (32, 128, 16), (128, 128, 128))
    module.SIZES = (2**8, 2**16)
    module._large_product = lambda *_: 1.0  # type: ignore[assignment]
    found = module.calibrate(torch.device("cpu"), rounds=3)
    link = found.inside
    sharing = [(s.processes, s.slowdown.value) for s in found.sharing]
    assert found.shared is not None and found.neighbours is found.shared
    alone, everyone = found.sharing[0], found.sharing[-1]
    assert alone.inside is alone.shared is None
    assert everyone.inside is not None and everyone.shared is not None
    assert found.among(everyone.processes).inside == everyone.inside
    assert alone.lockstep is None and everyone.lockstep is not None and 1 <= everyone.lockstep.value < 10
    ways = found.shared.bandwidth.source, link.bandwidth.source
    return found.processes_per_node, link.bandwidth.value, link.latency.value, sharing, *ways


def links_of(count: int) -> tuple[Any, Any]:
    """What calibration says of links between so many processes; the others wait."""
    module.SIZES = (2**8, 2**16)
    mesh = make_mesh(ParallelConfig())
    return module._links(count, mesh, 3, torch.device("cpu"), "test")


def test_fewer_processes_have_links_of_their_own(pool4: Pool) -> None:
    found = pool4.run(links_of, 3)
    assert found == [found[0]] * 4  # also who waited knows
    inside, shared = found[0]
    assert "all-to-all of 3 ranks over sockets" in inside.bandwidth.source and inside.bandwidth.value > 0
    assert "all-to-all of 3 ranks through shared memory" in shared.bandwidth.source and shared.bandwidth.value > 0


def worked() -> tuple[dict[str, float], int]:
    """Times, and how often this process worked for them."""
    calls: list[int] = []
    return module._timed({"work": lambda: calls.append(1)}, 3, torch.device("cpu")), len(calls)


def test_one_process_is_timed_and_the_others_wait(pool2: Pool) -> None:
    (first, busy), (second, idle) = pool2.run(worked)
    assert first == second and busy >= 3 and idle == 0


def test_messages_and_sharing_are_figures(pool2: Pool) -> None:
    first, second = pool2.run(figures)
    ranks, bandwidth, latency, sharing, shared, apart = first
    assert "through shared memory" in shared and "over sockets" in apart
    assert first == second
    assert ranks == 2 and bandwidth > 0 and latency >= 0
    assert [processes for processes, _ in sharing] == [1, 2]
    assert sharing[0][1] == 1 and sharing[1][1] > 0
