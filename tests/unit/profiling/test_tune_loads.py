"""δ(c) from recorded loads against queues that are really cut, and the least factor against a scan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swinmoe.config import CapacityPolicy
from swinmoe.moe import Routing, capacity
from swinmoe.moe.dispatch import queue
from swinmoe.profiling.tune.loads import STEP, Load, drop_bound, drop_fraction, imbalance, least_factor, upper_bound

policies = st.builds(
    CapacityPolicy,
    kind=st.sampled_from(["fixed", "bounded", "dropless"]),
    factor=st.floats(0.05, 3),
    min_slots=st.integers(0, 5),
)


def routed(tokens: int, experts: int, top_k: int, seed: int) -> Routing:
    """Random choices, some experts much likelier than others."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=draw) + 2 * torch.rand(experts, generator=draw)
    ids = scores.argsort(1, descending=True)[:, :top_k]
    probs = scores.softmax(1)
    return Routing(ids, probs.gather(1, ids), scores, scores, probs, 0.0)


def load_of(routing: Routing) -> Load:
    tokens, top_k = routing.expert_ids.shape
    counts = torch.bincount(routing.expert_ids.flatten(), minlength=routing.probs.shape[1])
    return Load(tuple(counts.tolist()), tokens, top_k)


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(0, 50),
    experts=st.integers(1, 8),
    top_k=st.integers(1, 3),
    seed=st.integers(0, 999),
    policy=policies,
    by_priority=st.booleans(),
)
def test_drops_are_those_of_the_queues(tokens, experts, top_k, seed, policy, by_priority):
    top_k = min(top_k, experts)
    routing = routed(tokens, experts, top_k, seed)
    limit = capacity(policy, tokens, experts, top_k)
    cut = queue(routing, experts, limit, batch_prioritized=by_priority)
    lost = tokens * top_k if cut.kept is None else int(cut.kept.sum())
    assert load_of(routing).dropped(policy) == tokens * top_k - lost


def test_the_fraction_is_over_all_choices():
    loads = [Load((6, 2), 8, 1), Load((3, 1), 4, 1), Load((0, 0), 0, 1)]
    half = CapacityPolicy(kind="bounded", factor=1.0)
    assert drop_fraction(loads, half) == (2 + 1) / 12
    assert drop_fraction(loads[2:], half) == 0.0


@settings(max_examples=50, deadline=None)
@given(seeds=st.lists(st.integers(0, 99), min_size=1, max_size=5), max_drop=st.sampled_from([0.0, 0.01, 0.05, 0.3]))
def test_the_least_factor_keeps_the_bound_and_the_next_smaller_does_not(seeds, max_drop):
    loads = [load_of(routed(40, 4, 1, seed)) for seed in seeds]
    policy = CapacityPolicy(kind="bounded", min_slots=0)
    factor = least_factor(loads, policy, max_drop)

    def bound(c: float) -> float:
        return drop_bound(loads, CapacityPolicy(kind="bounded", factor=c, min_slots=0))

    assert bound(factor) <= max_drop
    if factor > STEP:
        assert bound(round(factor - STEP, 10)) > max_drop


def test_the_bound_is_the_mean_and_1_645_standard_errors():
    assert upper_bound([]) == 0.0 and upper_bound([0.3]) == 0.3
    assert upper_bound([0.0, 0.1, 0.2, 0.3]) == pytest.approx(0.15 + 1.645 * 0.1290994449 / 2)


def test_imbalance_of_experts_and_of_ranks():
    """By hand: 4 experts, batches of 12 choices."""
    loads = [Load((6, 2, 1, 3), 12, 1), Load((1, 1, 8, 2), 12, 1), Load((0, 0, 0, 0), 0, 1), Load((3, 3, 3, 3), 12, 1)]
    assert imbalance(loads) == pytest.approx((6 / 3 + 8 / 3 + 1) / 3)
    assert imbalance(loads, 2) == pytest.approx((8 / 6 + 10 / 6 + 1) / 3)
    # Sums of two batches: (7, 3, 9, 5) and (3, 3, 3, 3)
    assert imbalance(loads, 2, 2) == pytest.approx((14 / 12 + 1) / 2)
    assert imbalance(loads, 4, 2) == pytest.approx((9 / 6 + 1) / 2)
    assert imbalance(loads, 8, 2) == imbalance(loads, 4, 2)  # two slices of each expert see the same rows
    assert imbalance(loads[2:3]) == 0.0
