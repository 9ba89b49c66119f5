"""Steps take turns, and the median's interval is the binomial's."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest

from swinmoe.profiling import Timing, median_interval, take_turns
from swinmoe.report import interval_name


def coverage(n: int, k: int) -> float:
    """P(x_(k) <= median <= x_(n+1-k)) by counting all 2^n ways in which n draws fall below or above the median."""
    inside = sum(k <= sum(below) <= n - k for below in product((0, 1), repeat=n))
    return inside / 2**n


@pytest.mark.parametrize("n", range(6, 16))
def test_the_interval_is_the_narrowest_that_covers(n: int) -> None:
    low, high = median_interval([float(i) for i in range(n, 0, -1)])
    assert low + high == n + 1, "symmetric"
    k = int(low)
    assert coverage(n, k) >= 0.95 > coverage(n, k + 1)


@pytest.mark.parametrize("n", range(1, 6))
def test_few_draws_give_their_range(n: int) -> None:
    assert coverage(n, 1) < 0.95
    assert median_interval([float(i) for i in range(n)]) == (0.0, float(n - 1))


def test_an_interval_is_called_one_where_it_is() -> None:
    assert [interval_name(n) for n in (1, 5, 6)] == ["range", "range", "95 %"]
    for n in range(1, 12):
        assert (coverage(n, 1) >= 0.95) == (interval_name(n) == "95 %")


def test_percentiles_are_rounds() -> None:
    timing = Timing(tuple(float(i) for i in range(1, 21)))
    assert (timing.median, timing.percentile(50), timing.percentile(95), timing.percentile(100)) == (10.5, 10, 19, 20)
    assert timing.percentile(0) == 1


def test_steps_take_turns() -> None:
    calls: list[str] = []
    rounds: list[int] = []
    taken = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, on_round=rounds.append)
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"
    assert rounds == [1, 2, 3]
    assert [len(timing.ms) for timing in taken.values()] == [3, 3]
    assert set(taken["a"].as_json()) == {"median", "low", "high", "rounds"}


def test_primed_steps_go_twice_and_count_once() -> None:
    calls: list[str] = []
    taken = take_turns({"a": partial(calls.append, "a"), "b": partial(calls.append, "b")}, 2, warm_up=0, primed=True)
    assert calls == ["a", "a", "b", "b", "b", "b", "a", "a"]
    assert len(taken["a"].ms) == 2
