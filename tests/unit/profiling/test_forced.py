"""Loads that are asked for come, with different experts for every token."""

from __future__ import annotations

import pytest
import torch

from swinmoe.config import MoEConfig, RouterConfig
from swinmoe.moe import MoEMlp
from swinmoe.profiling.forced import ForcedRouter, shares, skewed_ids


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (8, 2), (5, 3), (4, 4)])
@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0, 3.0])
def test_every_expert_gets_its_share(experts: int, top_k: int, skew: float) -> None:
    tokens = 4000
    ids = skewed_ids(tokens, experts, top_k, skew)
    assert ids.shape == (tokens, top_k)
    assert all(len(set(row)) == top_k for row in ids.tolist()), "a token meets an expert once"
    wanted = shares(experts, top_k, skew)
    assert float(wanted.sum()) == pytest.approx(top_k) and float(wanted.max()) <= 1
    found = torch.bincount(ids.reshape(-1), minlength=experts) / tokens
    assert torch.allclose(found.double(), wanted, atol=0.002)


def test_shares_follow_zipf_where_no_expert_is_full() -> None:
    assert shares(4, 1, 1.0).tolist() == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25])
    assert shares(3, 2, 2.0).tolist() == pytest.approx([1.0, 9 / 13, 4 / 13])


def test_no_skew_is_balance_to_within_one_choice() -> None:
    load = torch.bincount(skewed_ids(13, 4, 2, 0.0).reshape(-1), minlength=4)
    assert int(load.max() - load.min()) <= 1


@pytest.mark.parametrize("normalize", [False, True])
def test_gates_are_those_of_the_experts_that_were_forced(normalize: bool) -> None:
    cfg = MoEConfig(num_experts=4, top_k=2, router=RouterConfig(normalize_gates=normalize))
    layer = MoEMlp(cfg, dim=8, hidden_dim=16)
    router = ForcedRouter(layer.router, normalize)
    x = torch.randn(8, 8)
    own = layer.router(x)
    assert torch.equal(router(x).expert_ids, own.expert_ids)
    # Forced to what it had chosen anyway, nothing changes.
    router.skew = 0.0
    router._ids = {(8, 4, 2, 0.0, x.device): own.expert_ids}
    assert torch.equal(router(x).gates, own.gates)
    router._ids = {}
    layer.router = router  # type: ignore[assignment]
    _, stats = layer(x)
    assert stats.routed.tolist() == [4, 4, 4, 4]
