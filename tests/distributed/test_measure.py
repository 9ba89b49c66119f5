"""What measurements conclude from their times: bandwidth of messages that a link limits, and where a winner changes."""

from __future__ import annotations

import pytest
from measure_exchange import DIM, PER_HOST, ROWS, WELL_ABOVE, crossover, fit
from two_hosts import BURST_KIB

SIZES = [PER_HOST * PER_HOST * rows * DIM * 4 / 1024 for rows in ROWS]


def through_a_bucket(kib: float, latency: float = 0.4, kib_per_ms: float = 122.0) -> float:
    """Milliseconds where the first `BURST_KIB` pass at once."""
    return latency + max(0.0, kib - BURST_KIB) / kib_per_ms


def test_a_bucket_is_seen_through() -> None:
    """Half of the sizes fit into the burst: a line through all of them would show neither latency nor rate."""
    assert sum(size < BURST_KIB for size in SIZES) == 3
    found = fit(SIZES, [through_a_bucket(size) for size in SIZES])
    assert found["sizes"] == sum(size >= WELL_ABOVE * BURST_KIB for size in SIZES) == 4
    assert found["latency_ms"] == pytest.approx(0.4, abs=1e-3)
    assert found["mbit_per_s"] == pytest.approx(122.0 * 8 * 1.024, abs=0.1)


@pytest.mark.parametrize(
    ("flat", "staged", "said"),
    [
        ([3, 4, 5], [1, 2, 6], "2dh is faster up to 8 KiB, flat from 16 KiB"),
        ([1, 2, 3], [2, 3, 4], "none seen: flat is faster at every size"),
        (
            [2, 1, 3],
            [1, 2, 2],
            "2dh is faster up to 4 KiB, flat from 8 KiB; flat is faster up to 8 KiB, 2dh from 16 KiB",
        ),
    ],
)
def test_the_crossover_is_said(flat: list[float], staged: list[float], said: str) -> None:
    assert crossover([4.0, 8.0, 16.0], flat, staged) == said
