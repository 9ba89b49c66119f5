"""Auxiliary losses against numpy formulas, and against the batch being spread over ranks."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from swinmoe.config import BalanceLossConfig, MoEConfig, RouterConfig
from swinmoe.moe import MoEMlp, Routing
from swinmoe.moe.losses import LOSSES, batch_sums, losses_from_sums


def make_routing(tokens: int, experts: int, top_k: int, seed: int = 0, spread: float = 1.0) -> Routing:
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=gen, dtype=torch.float64) * spread
    noisy = logits + torch.randn(tokens, experts, generator=gen, dtype=torch.float64) / experts
    probs = noisy.softmax(-1)
    ids = probs.topk(top_k).indices
    return Routing(ids, probs.gather(1, ids), logits, noisy, probs, 1 / experts)


def numpy_losses(routing: Routing, std: float) -> dict[str, float]:
    logits, noisy = routing.logits.numpy(), routing.noisy_logits.numpy()
    clean = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    probs = np.exp(noisy) / np.exp(noisy).sum(1, keepdims=True)
    ids = routing.expert_ids.numpy()
    experts = logits.shape[1]
    top1 = np.bincount(ids[:, 0], minlength=experts)
    threshold = np.take_along_axis(noisy, ids[:, -1:], 1)

    def cv2(v: np.ndarray) -> float:
        return v.var(ddof=1) / (v.mean() ** 2 + 1e-10)

    importance = cv2(clean.sum(0))
    load = cv2(norm.cdf((logits - threshold) / std).sum(0))
    tutel_load = cv2(norm.cdf((clean - threshold) / std).sum(0))
    return {
        "gshard": experts * (probs.mean(0) * top1 / len(logits)).sum(),
        "importance": importance,
        "load": load,
        "importance_load": (importance + load) / 2,
        "importance_load_tutel": (importance + tutel_load) / 2,
        "z": (np.log(np.exp(logits).sum(1)) ** 2).mean(),
    }


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_formula(name, top_k):
    routing = make_routing(13, 5, top_k)
    sums = batch_sums([name], routing, routing.probs, 1 / 5)
    got = losses_from_sums([name], sums, 5)[name]
    np.testing.assert_allclose(float(got), numpy_losses(routing, 1 / 5)[name], rtol=1e-12)


def test_gshard_is_one_when_balanced_and_num_experts_when_collapsed():
    ids = torch.arange(8).view(8, 1) % 4
    flat = torch.full((8, 4), 0.25)
    balanced = Routing(ids, flat[:, :1], flat, flat, flat, 0.0)
    assert losses_from_sums(["gshard"], batch_sums(["gshard"], balanced, flat, 0.0), 4)["gshard"] == 1
    sure = torch.eye(4)[:1].expand(8, 4)
    collapsed = Routing(torch.zeros_like(ids), sure[:, :1], sure, sure, sure, 0.0)
    assert losses_from_sums(["gshard"], batch_sums(["gshard"], collapsed, sure, 0.0), 4)["gshard"] == 4


def test_sums_of_ranks_give_the_loss_of_the_whole_batch():
    whole = make_routing(12, 4, 2)
    parts = [
        Routing(*(getattr(whole, f)[a:b] for f in ("expert_ids", "gates", "logits", "noisy_logits", "probs")), 0.25)
        for a, b in ((0, 5), (5, 5), (5, 12))  # one rank has no tokens
    ]
    together = losses_from_sums(LOSSES, batch_sums(LOSSES, whole, whole.probs, 0.25), 4)
    spread = losses_from_sums(LOSSES, sum(batch_sums(LOSSES, p, p.probs, 0.25) for p in parts), 4)
    alone = losses_from_sums(LOSSES, batch_sums(LOSSES, parts[0], parts[0].probs, 0.25), 4)
    for name in LOSSES:
        torch.testing.assert_close(spread[name], together[name], rtol=1e-12, atol=0)
        assert abs(float(alone[name] - together[name])) > 1e-3  # a rank's own loss is another one


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_load_loss_keeps_its_gradient_where_the_literal_tutel_form_loses_it(spread):
    def slope(name: str) -> float:
        r = make_routing(64, 32, 1, spread=spread)
        logits = r.logits.requires_grad_()
        noisy = logits + (r.noisy_logits - r.logits).detach()
        routing = Routing(r.expert_ids, r.gates, logits, noisy, noisy.softmax(-1), r.noise_std)
        loss = losses_from_sums([name], batch_sums([name], routing, routing.probs, 1 / 32), 32)[name]
        importance = losses_from_sums(["importance"], batch_sums(["importance"], routing, routing.probs, 1 / 32), 32)
        rest = loss - importance["importance"] / 2  # the load's share
        return float(torch.autograd.grad(rest, logits)[0].abs().max())

    assert slope("importance_load") > 1e-4
    if spread == 3.0:
        assert slope("importance_load_tutel") < 1e-6


@pytest.mark.parametrize("experts", [1, 4])
def test_no_tokens_no_loss_no_gradient(experts):
    cfg = MoEConfig(
        num_experts=experts,
        router=RouterConfig(noise=1.0),
        losses=BalanceLossConfig(gshard=1, importance=1, load=1, importance_load=1, importance_load_tutel=1, z=1),
    )
    layer = MoEMlp(cfg, dim=3, hidden_dim=4)
    x = torch.zeros(2, 0, 3, requires_grad=True)
    y, stats = layer(x)
    assert y.shape == (2, 0, 3)
    assert stats.loss == 0
    assert set(stats.losses) == set(LOSSES)
    assert all(value == 0 for value in stats.losses.values())
    (y.sum() + stats.loss).backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert torch.equal(p.grad, torch.zeros_like(p)), name


def test_one_token_and_one_expert_give_finite_gradients():
    cfg = MoEConfig(
        num_experts=1,
        router=RouterConfig(noise=1.0),
        losses=BalanceLossConfig(gshard=1, importance_load=1, z=1),
    )
    layer = MoEMlp(cfg, dim=3, hidden_dim=4)
    y, stats = layer(torch.randn(1, 3))
    (y.sum() + stats.loss).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    assert stats.losses["importance_load"] == 0


def test_only_weighted_losses_are_computed_and_summed():
    cfg = MoEConfig(num_experts=4, losses=BalanceLossConfig(gshard=0.5, z=2.0))
    _, stats = MoEMlp(cfg, dim=3, hidden_dim=4, init_std=1.0)(torch.randn(7, 3))
    assert list(stats.losses) == ["gshard", "z"]
    assert not any(value.requires_grad for value in stats.losses.values())
    torch.testing.assert_close(stats.loss, 0.5 * stats.losses["gshard"] + 2.0 * stats.losses["z"])
    silent = MoEMlp(MoEConfig(num_experts=4, losses=BalanceLossConfig()), dim=3, hidden_dim=4)
    assert silent(torch.randn(7, 3))[1].loss == 0


class TwoRanks:
    """Stands for an execution whose other rank holds the same sums."""

    def __init__(self, local):
        self.local, self.calls = local, 0

    def __getattr__(self, name):
        return getattr(self.local, name)

    def reduce(self, stats):
        self.calls += 1
        return stats + stats.detach()  # the backward of a reduction is the identity


@pytest.mark.parametrize("batch", ["global", "local"])
def test_one_reduction_per_forward_and_none_for_local_balance(batch):
    cfg = MoEConfig(
        num_experts=4,
        router=RouterConfig(noise=1.0),
        losses=BalanceLossConfig(gshard=1, importance_load=1, z=1, batch=batch),
    )
    layer = MoEMlp(cfg, dim=3, hidden_dim=4, init_std=1.0)
    x = torch.randn(7, 3)
    noise = layer.draw_noise(7, "cpu")
    before = layer(x, noise)[1].losses
    layer.execution = ranks = TwoRanks(layer.execution)
    after = layer(x, noise)[1].losses
    assert ranks.calls == (1 if batch == "global" else 0)
    for name in before:  # twice the same tokens: the same balance
        torch.testing.assert_close(after[name], before[name])


def test_sigmoid_scores_balance_normalised_probabilities():
    cfg = MoEConfig(num_experts=4, router=RouterConfig(score="sigmoid"), losses=BalanceLossConfig(gshard=1))
    layer = MoEMlp(cfg, dim=3, hidden_dim=4, init_std=1.0)
    x = torch.randn(9, 3)
    _, stats = layer(x)
    p = (x @ layer.router.weight.t()).sigmoid().detach().numpy().astype(float)
    p /= p.sum(1, keepdims=True)
    top1 = np.bincount(p.argmax(1), minlength=4) / 9
    np.testing.assert_allclose(float(stats.losses["gshard"]), 4 * (p.mean(0) * top1).sum(), rtol=1e-5)
    np.testing.assert_allclose(float(stats.entropy_sum), -(p * np.log(p)).sum(), rtol=1e-5)
    assert 0 < float(stats.entropy_sum) / 9 / math.log(4) < 1
