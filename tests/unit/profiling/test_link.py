"""Links found again from times that they would give, with noise and without."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swinmoe.profiling.link import Link, Sample, fit_link

SIZES = [4096 * 4**i for i in range(7)]
latencies = st.floats(1e-6, 1e-3)
bandwidths = st.floats(1e8, 1e11)


def seconds(latency: float, bandwidth: float, half: float, messages: int, size: float, rounds: int) -> float:
    """By hand: rounds of latency, then one message after another at B·s/(s + h)."""
    at = bandwidth * size / (size + half)
    return rounds * latency + messages * size / at


def samples(latency: float, bandwidth: float, half: float, layouts: list[tuple[int, int]]) -> list[Sample]:
    return [
        Sample(messages, size, seconds(latency, bandwidth, half, messages, size, rounds), rounds)
        for messages, rounds in layouts
        for size in SIZES
    ]


@given(latencies, bandwidths)
def test_latency_and_bandwidth_of_one_group_are_found(latency: float, bandwidth: float) -> None:
    link = fit_link(samples(latency, bandwidth, 0.0, [(3, 1)]))
    assert link.latency == pytest.approx(latency, rel=1e-6)
    assert link.bandwidth == pytest.approx(bandwidth, rel=1e-6)
    assert link.half_message == 0 and link.worst_error < 1e-6


@given(latencies, bandwidths, st.floats(1e2, 1e6))
def test_groups_of_several_sizes_tell_latency_from_what_each_message_costs(a: float, b: float, half: float) -> None:
    link = fit_link(samples(a, b, half, [(1, 1), (3, 1), (7, 1), (2, 2)]))
    predicted = [link.seconds(7, s) for s in SIZES]
    assert predicted == pytest.approx([seconds(a, b, half, 7, s, 1) for s in SIZES], rel=1e-6)
    assert link.latency == pytest.approx(a, rel=1e-4, abs=1e-3 * half / b)
    assert link.half_message == pytest.approx(half, rel=1e-4, abs=1e-3 * a * b)


@given(latencies, bandwidths, st.floats(1e2, 1e6))
def test_what_cannot_be_told_apart_counts_as_latency_and_predicts_the_same(a: float, b: float, half: float) -> None:
    link = fit_link(samples(a, b, half, [(3, 1)]))
    assert link.half_message == 0
    assert link.latency == pytest.approx(a + 3 * half / b, rel=1e-6)
    size = link.half(3)  # 3 messages of it take twice as long as at B
    assert 3 * size / seconds(a, b, half, 3, size, 1) == pytest.approx(b / 2, rel=1e-6)


@settings(max_examples=50)
@given(latencies, bandwidths, st.integers(0, 10**6))
def test_noise_moves_the_fit_by_no_more_than_its_own_errors_say(a: float, b: float, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(1, 0.03, len(SIZES)).clip(0.9, 1.1)
    noisy = [
        Sample(s.messages, s.size, s.seconds * n) for s, n in zip(samples(a, b, 0.0, [(1, 1)]), noise, strict=True)
    ]
    link = fit_link(noisy)
    assert link.worst_error < 0.2
    assert link.typical_error <= link.worst_error
    ends = {"latency": (link.latency, a, SIZES[0]), "bandwidth": (1 / link.bandwidth, 1 / b, SIZES[-1])}
    for found, true, size in ends.values():
        # what a part is off by is small beside the whole time where that part counts most
        weight = size if true == 1 / b else 1
        assert abs(found - true) * weight < 0.2 * seconds(a, b, 0.0, 1, size, 1)


def test_errors_are_those_of_each_sample_and_the_standard_errors_shrink_with_samples() -> None:
    generator = np.random.default_rng(0)
    true = samples(1e-4, 1e9, 0.0, [(1, 1)])

    def noisy(times: int) -> Link:
        return fit_link([Sample(1, s.size, s.seconds * generator.normal(1, 0.05)) for _ in range(times) for s in true])

    once, often = noisy(1), noisy(100)
    assert 0 < often.latency_error < once.latency_error < 0.2
    assert 0 < often.bandwidth_error < once.bandwidth_error < 0.2
    # 700 samples of 5 %: 5/sqrt(~350) % for each of the two
    assert often.latency == pytest.approx(1e-4, rel=0.02) and often.bandwidth == pytest.approx(1e9, rel=0.02)
    assert float(np.std(often.errors)) == pytest.approx(0.05, rel=0.15)


def test_a_point_far_off_is_the_worst_error() -> None:
    points = samples(1e-4, 1e9, 0.0, [(1, 1)])
    points[3] = Sample(1, points[3].size, 2 * points[3].seconds)
    link = fit_link(points)
    assert link.worst_error == max(map(abs, link.errors)) == abs(link.errors[3]) > 0.3


def test_nothing_is_negative() -> None:
    """Times that fall with size, and times in proportion to it."""
    falling = fit_link([Sample(1, s, t) for s, t in zip(SIZES, (7, 6, 5, 4, 3, 2, 1), strict=True)])
    assert falling.bandwidth == math.inf and falling.latency > 0 and falling.half_message == 0
    assert falling.seconds(1, 1e6) == falling.latency
    pure = fit_link([Sample(1, s, s / 1e9) for s in SIZES])
    assert pure.latency == pytest.approx(0, abs=1e-12) and pure.bandwidth == pytest.approx(1e9)
    assert pure.latency_error == 0
    assert pure.seconds(0, 1e6) == 0


def test_one_size_is_refused() -> None:
    with pytest.raises(AssertionError, match="one size"):
        fit_link([Sample(1, 1024, 1.0), Sample(1, 1024, 1.1)])
