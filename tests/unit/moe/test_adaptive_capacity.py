"""Adaptive capacity in a layer: exact need against brute force, and the promise it keeps whatever its factor is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swinmoe.config import AdaptConfig, CapacityConfig, CapacityPolicy, MoEConfig, RouterConfig
from swinmoe.moe import MoEMlp, allowed_drops, capacity, least_cut
from swinmoe.verify.oracle import OracleMoEMlp


def excess(loads: list[int], cut: int) -> int:
    return sum(max(0, load - cut) for load in loads)


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(0, 80))
def test_the_least_cut_is_the_first_that_drops_no_more(loads, allowed):
    cut = int(least_cut(torch.tensor(loads), allowed))
    assert cut == next(c for c in range(max(loads) + 1) if excess(loads, c) <= allowed)
    assert int(least_cut(torch.tensor(loads), torch.tensor(allowed))) == cut


def adaptive_layer(dispatcher: str = "ragged", *, factor: float = 1.0, max_drop: float = 0.05, **cfg: Any) -> MoEMlp:
    policy = CapacityPolicy(kind="adaptive", factor=factor, adapt=AdaptConfig(max_drop=max_drop, floor=0.0))
    made = MoEConfig(num_experts=4, dispatcher=dispatcher, capacity=CapacityConfig(train=policy), **cfg)
    return MoEMlp(made, dim=4, hidden_dim=6, init_std=1.0, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    factor=st.floats(0.05, 3),
    max_drop=st.sampled_from([0.0, 0.01, 0.1, 0.29, 0.6]),
    top_k=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_no_batch_loses_more_than_asked(tokens, factor, max_drop, top_k, seed):
    layer = adaptive_layer(factor=factor, max_drop=max_drop, top_k=top_k)
    generator = torch.Generator().manual_seed(seed)
    # A common direction makes some experts much busier than others.
    x = torch.randn(tokens, 4, generator=generator, dtype=torch.float64) + 2 * torch.randn(4, generator=generator)
    _, stats = layer(x)
    policy = layer.cfg.capacity.train
    routed, kept = stats.routed.tolist(), stats.kept.tolist()
    standing = capacity(policy, tokens, 4, top_k)
    assert sum(routed) - sum(kept) <= max_drop * tokens * top_k
    allowed = allowed_drops(policy, tokens, top_k)
    cut = max(standing, next(c for c in range(tokens + 1) if excess(routed, c) <= allowed))
    assert kept == [min(load, cut) for load in routed]  # and no fewer drops than the factor asks for, either


@pytest.mark.parametrize("dispatcher", ["padded", "gshard", "auto"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_every_dispatcher_drops_the_same(dispatcher, top_k):
    x = torch.randn(31, 4, dtype=torch.float64) + 1
    ragged = adaptive_layer(factor=0.5, top_k=top_k)
    expected, stats = ragged(x)
    assert 0 < int((stats.routed - stats.kept).sum()) <= 0.05 * 31 * top_k
    other = adaptive_layer(dispatcher, factor=0.5, top_k=top_k)
    y, theirs = other(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert torch.equal(theirs.expert_ids, stats.expert_ids)


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("max_drop", [0.0, 0.1])
def test_it_is_the_oracles(prioritized, max_drop):
    router = RouterConfig(batch_prioritized=prioritized)
    layer = adaptive_layer(factor=0.4, max_drop=max_drop, router=router, top_k=2)
    x = torch.randn(23, 4, dtype=torch.float64) + 1
    expected, theirs = OracleMoEMlp(layer)(x)
    y, stats = layer(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert torch.equal(stats.expert_ids, theirs.expert_ids)
    assert bool((stats.expert_ids < 0).any()) == (max_drop > 0)


def test_evaluation_is_not_touched():
    layer = adaptive_layer(factor=0.4).eval()
    _, stats = layer(torch.randn(23, 4, dtype=torch.float64) + 1)
    assert torch.equal(stats.routed, stats.kept)
