"""Closed forms of a layer's products against torch's counter on the layer itself."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swinmoe.config import CapacityConfig, CapacityPolicy, MoEConfig
from swinmoe.moe import MoEMlp
from swinmoe.profiling.flops import Rows, layer_flops, mlp_flops

TOKENS, DIM, HIDDEN, EXPERTS = 48, 8, 16, 4


def built(dispatcher: str, top_k: int, policy: CapacityPolicy) -> MoEMlp:
    capacity = CapacityConfig(train=policy, eval=policy)
    cfg = MoEConfig(num_experts=EXPERTS, top_k=top_k, dispatcher=dispatcher, capacity=capacity)
    return MoEMlp(cfg, dim=DIM, hidden_dim=HIDDEN)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(
    ("dispatcher", "policy"),
    [
        ("ragged", CapacityPolicy()),
        ("ragged", CapacityPolicy(kind="fixed", factor=0.75)),
        ("padded", CapacityPolicy(kind="fixed", factor=1.5)),
        ("gshard", CapacityPolicy(kind="fixed", factor=1.0)),
    ],
)
def test_hardware_flops_are_what_the_counter_sees(
    dispatcher: str, policy: CapacityPolicy, top_k: int, backward: bool
) -> None:
    layer = built(dispatcher, top_k, policy)
    x = torch.randn(TOKENS, DIM, requires_grad=True)
    routing, _, route, stats = layer.assign(x.detach(), None)
    kept = int(stats.kept.sum())
    rows = Rows(TOKENS * top_k, kept, kept if route.slots is None else EXPERTS * route.slots)
    with FlopCounterMode(display=False) as counter:
        y, stats = layer(x)
        if backward:
            torch.autograd.backward([y, stats.loss], [torch.ones_like(y), None])
    found = layer_flops(
        rows,
        tokens=TOKENS,
        dim=DIM,
        hidden=HIDDEN,
        experts=EXPERTS,
        slots=route.slots,
        backward=backward,
        masks=dispatcher == "gshard",
    )
    assert found.hardware == counter.get_total_flops()
    passes = 3 if backward else 1
    router = passes * 2 * TOKENS * DIM * EXPERTS
    assert found.model == router + passes * kept * 4 * DIM * HIDDEN
    assert routing.gates.shape == (TOKENS, top_k)


def test_the_dense_equivalent_is_an_mlp_of_k_times_the_width() -> None:
    dense = torch.nn.Sequential(torch.nn.Linear(DIM, 2 * HIDDEN), torch.nn.Linear(2 * HIDDEN, DIM))
    x = torch.randn(TOKENS, DIM, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        dense(x).sum().backward()
    rows = Rows(2 * TOKENS, TOKENS, 3 * TOKENS)
    found = layer_flops(
        rows, tokens=TOKENS, dim=DIM, hidden=HIDDEN, experts=EXPERTS, slots=None, backward=True, masks=False
    )
    assert found.dense_equivalent == counter.get_total_flops() == 3 * mlp_flops(2 * TOKENS, DIM, HIDDEN)


def test_shares_of_rows() -> None:
    rows = Rows(routed=100, kept=80, computed=160)
    assert (rows.dropped, rows.padding) == (pytest.approx(0.2), pytest.approx(0.5))
    assert (Rows(0, 0, 0).dropped, Rows(0, 0, 0).padding) == (0.0, 0.0)
