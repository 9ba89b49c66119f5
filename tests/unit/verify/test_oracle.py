"""The oracle against results typed in by hand, and against the other oracle, which loops over single tokens.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from swinmoe.config import BalanceLossConfig, CapacityConfig, CapacityPolicy, ExpertConfig, MoEConfig, RouterConfig
from swinmoe.models import create_model
from swinmoe.moe import MoEMlp, register_expert
from swinmoe.moe.experts import GeluExperts
from swinmoe.moe.registry import EXPERTS
from swinmoe.verify.oracle import OracleMoEMlp, balance_loss, install, set_groups

D = 6


def layer(**changes: Any) -> MoEMlp:
    cfg = MoEConfig(**{"num_experts": 3, "losses": BalanceLossConfig(), **changes})
    made = MoEMlp(cfg, dim=D, hidden_dim=8, dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return made


def tokens(count: int) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def one_expert_layer(factor: float, prioritized: bool) -> OracleMoEMlp:
    """A layer whose two experts double and negate a token of width 1, and whose gate follows its sign."""
    policy = CapacityPolicy(kind="fixed", factor=factor)
    cfg = MoEConfig(
        num_experts=2,
        router=RouterConfig(batch_prioritized=prioritized),
        capacity=CapacityConfig(train=policy),
        losses=BalanceLossConfig(),
        experts=ExpertConfig(fc1_bias=False, fc2_bias="none"),
    )
    made = MoEMlp(cfg, dim=1, hidden_dim=1, dtype=torch.float64)
    with torch.no_grad():
        made.router.weight.copy_(torch.tensor([[1.0], [-1.0]]))  # type: ignore[union-attr]
        made.experts.fc1_weight.copy_(torch.tensor([[[1.0]], [[-1.0]]]))
        made.experts.fc2_weight.copy_(torch.tensor([[[2.0]], [[1.0]]]))
    return OracleMoEMlp(made)


def test_two_groups_of_three_tokens_by_hand() -> None:
    """One slot per expert and group, ⌊0.5·⌈3/2⌉⌋ = 1: for the first token of each sign, or for the largest."""
    x = torch.tensor([[1.0], [2.0], [-1.0], [3.0], [-2.0], [-4.0]], dtype=torch.float64)

    def out(value: float) -> float:
        gate = 1 / (1 + math.exp(-2 * abs(value)))  # softmax of (v, -v)
        gelu = abs(value) * 0.5 * (1 + math.erf(abs(value) / math.sqrt(2)))
        return gate * gelu * (2 if value > 0 else 1)

    for prioritized, kept in ((False, [0, 2, 3, 4]), (True, [1, 2, 3, 5])):
        oracle = one_expert_layer(0.5, prioritized)
        oracle.shares = (3, 3)
        y, stats = oracle(x)
        expected = [out(float(v)) if i in kept else 0.0 for i, v in enumerate(x)]
        torch.testing.assert_close(y.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)
        assert stats.routed.tolist() == [3, 3] and stats.kept.tolist() == [2, 2]
        assert (stats.expert_ids.flatten() >= 0).nonzero().flatten().tolist() == kept


def test_groups_decide_who_is_dropped() -> None:
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    oracle = one_expert_layer(1.0, False)
    for shares, kept in (((4,), [0, 1]), ((2, 2), [0, 2]), ((0, 1, 3), [0, 1, 2])):
        oracle.shares = shares
        _, stats = oracle(x)
        assert (stats.expert_ids.flatten() >= 0).nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("kind", ["dropless", "fixed"])
@pytest.mark.parametrize("expert", ["gelu", "swiglu"])
def test_both_oracles_agree(top_k: int, kind: Any, expert: str, loop_moe: Any) -> None:
    made = layer(
        top_k=top_k,
        capacity=CapacityConfig(train=CapacityPolicy(kind=kind, factor=0.6)),
        router=RouterConfig(batch_prioritized=True, normalize_gates=True),
        experts=ExpertConfig(type=expert),
        shared_expert_ratio=0.5,
    )
    x = tokens(11)
    y, stats = OracleMoEMlp(made)(x)
    expected, routed, kept = loop_moe(made, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert (stats.routed.tolist(), stats.kept.tolist()) == (routed, kept)


def test_balance_losses_by_hand() -> None:
    """Two tokens, two experts, both choose expert 0."""
    logits = torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    ids = torch.tensor([[0], [0]])
    p = [1 / (1 + math.exp(-v)) for v in (1, 3)]
    mean = sum(p) / 2
    importance = 2 * (sum(p) - 1) ** 2  # counts s and 2 - s: variance 2(s - 1)², mean 1

    def loss(name: str) -> float:
        return float(balance_loss(name, logits, logits, logits.softmax(-1), ids, 0.5))

    assert loss("gshard") == pytest.approx(2 * mean)
    assert loss("importance") == pytest.approx(importance)
    assert loss("z") == pytest.approx(sum(math.log(math.exp(v) + 1) ** 2 for v in (1, 3)) / 2)

    def phi(z: float) -> float:
        return 0.5 * (1 + math.erf(z / math.sqrt(2)))

    # The threshold is the chosen logit itself: expert 0 has probability 1/2, expert 1 that of making up the distance.
    counts = [1.0, phi(-1 / 0.5) + phi(-3 / 0.5)]

    def squared_cv(counts: list[float]) -> float:
        middle = sum(counts) / 2
        return sum((c - middle) ** 2 for c in counts) / middle**2

    load = squared_cv(counts)
    assert loss("load") == pytest.approx(load)
    assert loss("importance_load") == pytest.approx((importance + load) / 2)
    # Tutel's compares the probability with that logit.
    counts = [phi((p[0] - 1) / 0.5) + phi((p[1] - 3) / 0.5), phi(-p[0] / 0.5) + phi((1 - p[1] - 3) / 0.5)]
    assert loss("importance_load_tutel") == pytest.approx((importance + squared_cv(counts)) / 2)
    empty = logits[:0]
    assert float(balance_loss("gshard", empty, empty, empty, ids[:0], 0.5)) == 0


def test_local_losses_are_the_mean_over_groups() -> None:
    made = layer(losses=BalanceLossConfig(gshard=1.0, batch="local"))
    x = tokens(9)
    both = OracleMoEMlp(made)
    both.shares = (4, 5, 0)
    alone = OracleMoEMlp(made)
    parts = [alone(part)[1].loss for part in (x[:4], x[4:])]
    torch.testing.assert_close(both(x)[1].loss, (parts[0] + parts[1]) / 3)  # an empty group's loss is 0


def test_each_group_draws_its_own_noise() -> None:
    made = layer(router=RouterConfig(noise=3.0))
    oracle = OracleMoEMlp(made)
    oracle.shares, oracle.noise_keys = (2, 3), (7, 8)
    drawn = []
    for key, count in ((7, 2), (8, 3)):
        made.seed_noise(key)
        drawn.append(made.draw_noise(count, "cpu"))
    x = tokens(5)
    torch.testing.assert_close(oracle(x)[0], oracle(x, torch.cat(drawn))[0], rtol=0, atol=0)  # type: ignore[arg-type]


def test_an_expert_of_another_kind_is_asked_for_its_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EXPERTS, "_parts", dict(EXPERTS._parts))

    @register_expert("doubling")
    class Doubling(GeluExperts):
        def function(self, training: bool) -> Any:
            usual = super().function(training)
            return lambda rows, segments, w: 2 * usual(rows, segments, w)

    made = layer(experts=ExpertConfig(type="doubling"))
    x = tokens(7)
    torch.testing.assert_close(OracleMoEMlp(made)(x)[0], made(x)[0], rtol=0, atol=1e-12)


def test_a_model_keeps_its_parameters_and_names() -> None:
    model = create_model("swin_moe_micro", in_chans=1, grad_checkpointing=True)
    before = {name: id(p) for name, p in model.named_parameters()}
    install(model)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert model.moe_layers() and all(isinstance(m, OracleMoEMlp) for m in model.moe_layers().values())
    set_groups(model, (1, 2), ("key",))
    assert all(m.shares == (1, 2) and len(set(m.noise_keys)) == 2 for m in model.moe_layers().values())
