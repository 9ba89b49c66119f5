"""What an exchange is asked to be: sizes in words, shares of rows, combinations that cannot be; and fits by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swinmoe.config.io import build
from swinmoe.config.profile_exchange import ExchangeSweepConfig, ExchangeWorkload, listed_exchange, parse_bytes
from swinmoe.errors import ConfigError
from swinmoe.profiling.exchange import fits, skewed_rows


@pytest.mark.parametrize(
    ("text", "size"), [("4KiB", 4096), ("1.5 MB", 1_500_000), (4096, 4096), ("2mib", 2**21), ("7B", 7)]
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "4 XiB", "-1", "0", "1e9", "0.1B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"use bytes, or a unit as in 64KiB"):
        parse_bytes(text)


@given(st.integers(2, 9), st.integers(1, 50), st.floats(0, 1))
def test_a_share_of_every_ranks_rows_goes_to_the_first(ranks: int, each: int, skew: float) -> None:
    matrix = skewed_rows(ranks, each, skew)
    assert (matrix >= 0).all() and (matrix.sum(1) == ranks * each).all()
    assert (matrix == matrix[0]).all()
    assert abs(int(matrix[0, 0]) - (skew * ranks + 1 - skew) * each) <= 1
    assert all(abs(int(rows) - (1 - skew) * each) <= 1 for rows in matrix[0, 1:])


def test_combinations_that_cannot_be_are_said() -> None:
    tree = {"bytes": "64KiB", "exchange": ["flat", "2dh"], "local_size": [None, 2], "chunks": [1, 2]}
    found, refused = build(ExchangeSweepConfig, listed_exchange(tree)).workloads()
    assert len(found) == 6 and len(refused) == 1 and "2dh" in refused[0]
    assert {w.exchange for w in found if w.local_size == 2} == {"2dh"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"skew": 1.5}, "skew"),
        ({"ep_size": 1}, "nobody to send to"),
        ({"chunks": 0}, "chunks"),
        ({"bytes": 0}, "bytes"),
        ({"exchange": "2dh", "local_size": 3, "ep_size": 4}, "local_size"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ExchangeWorkload(**settings)


def line(size: int, ranks: int, seconds: float, local: int | None = None, skew: float = 0.0) -> dict[str, Any]:
    kind = "flat" if local is None else "2dh"
    return {
        "name": f"{kind} {size} {ranks}",
        "variant": {
            "exchange": kind,
            "local_size": local,
            "chunks": 1,
            "payload": "full",
            "direction": "forward",
            "skew": skew,
            "ep_size": ranks,
            "world": 8,
        },
        "ms": {"median": 1000 * seconds},
        "message_bytes": float(size),
        "ranks": ranks,
    }


SIZES = (2**12, 2**16, 2**20)


def test_a_fit_for_each_group_size_and_one_for_all() -> None:
    """α 50 µs, 2 GB/s, 8 KiB a message; messages in turn."""
    lines = [line(s, n, 5e-5 + (n - 1) * (s + 8192) / 2e9) for n in (2, 4, 8) for s in SIZES] + [
        line(2**16, 2, 1.0, skew=0.9)
    ]
    found = {fit["name"]: fit for fit in fits(lines)}
    assert list(found) == [
        "flat, 2 ranks, forward",
        "flat, all ranks together, forward",
        "flat, 4 ranks, forward",
        "flat, 8 ranks, forward",
    ]
    for name, fit in found.items():
        assert fit["bandwidth"] == pytest.approx(2e9, rel=1e-6), name
        assert fit["worst_error"] < 1e-6 and len(fit["points"]) == (9 if "all" in name else 3)
    four, whole = found["flat, 4 ranks, forward"], found["flat, all ranks together, forward"]
    assert four["latency_seconds"] == pytest.approx(5e-5 + 3 * 8192 / 2e9, rel=1e-6) and four["half_message"] == 0
    # three messages of h take as long as what is constant
    assert 3 * four["half_bandwidth_bytes"] / 2e9 == pytest.approx(four["latency_seconds"], rel=1e-6)
    assert whole["latency_seconds"] == pytest.approx(5e-5, rel=1e-4) and whole["half_bandwidth_bytes"] is None
    assert whole["half_message"] == pytest.approx(8192, rel=1e-4)


def test_two_stages_are_two_latencies_and_the_bytes_of_both() -> None:
    """8 ranks in nodes of 4: 3/4 of a rank's rows in the first stage, half of them in the second."""
    lines = [line(s, 8, 2 * 1e-4 + 8 * s * (3 / 4 + 1 / 2) / 1e9, local=4) for s in SIZES]
    (fit,) = fits(lines)
    assert fit["latency_seconds"] == pytest.approx(1e-4, rel=1e-6) and fit["bandwidth"] == pytest.approx(1e9, rel=1e-6)
    half = fit["half_bandwidth_bytes"]
    assert 8 * half * 1.25 / 1e9 == pytest.approx(2e-4, rel=1e-6)


def test_too_few_sizes_have_no_fit() -> None:
    assert list(fits([line(s, 2, 1e-3) for s in SIZES[:2]])) == []
