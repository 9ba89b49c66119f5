"""GShard's layer as FairScale wrote it (`MOELayer` with `Top2Gate`), beside ours with the `gshard` dispatcher.

FairScale differs in four ways; the tests name them:
- its second choice is drawn with Gumbel noise, in evaluation too: switched off here by its own table of samplers;
- its balance loss is a mean over experts of products of means, ours (GShard, Switch) is E² times that;
- it divides gates by their sum after drops, we (and Tutel) before: a token that loses one choice keeps a weight of 1
  there;
- it computes in float32 only, for token counts that E divides, with a capacity of exactly 2T/E.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from swinmoe.config import BalanceLossConfig, CapacityConfig, CapacityPolicy, MoEConfig, RouterConfig
from swinmoe.moe import MoEMlp, Routing
from swinmoe.moe.dispatchers.gshard import combine_weights

fairscale = pytest.importorskip("fairscale.nn.moe", reason="FairScale is not installed")
from fairscale.nn.moe import top2gate  # noqa: E402

T, E, D, F = 24, 4, 6, 8


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one, which FairScale's layer asks for."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def no_gumbel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(top2gate.gumbel_map, torch.device("cpu"), torch.zeros)


def our_layer(dispatcher: str = "gshard") -> MoEMlp:
    cfg = MoEConfig(
        num_experts=E,
        top_k=2,
        dispatcher=dispatcher,
        router=RouterConfig(normalize_gates=True),
        capacity=CapacityConfig(train=CapacityPolicy(kind="fixed", factor=1.0)),
        losses=BalanceLossConfig(gshard=1.0),
    )
    layer = MoEMlp(cfg, dim=D, hidden_dim=F, init_std=0.5)
    for bias in (layer.experts.fc1_bias, layer.experts.fc2_bias):
        nn.init.normal_(bias, std=0.3)
    return layer


def their_layer(ours: MoEMlp) -> nn.Module:
    experts = nn.ModuleList(nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D)) for _ in range(E))
    gate = fairscale.Top2Gate(D, E)
    stack = ours.experts
    with torch.no_grad():
        gate.wg.weight.copy_(ours.router.weight)
        for e, (fc1, _, fc2) in enumerate(experts):
            fc1.weight.copy_(stack.fc1_weight[e])
            fc1.bias.copy_(stack.fc1_bias[e])
            fc2.weight.copy_(stack.fc2_weight[e])
            fc2.bias.copy_(stack.fc2_bias[e])
    return fairscale.MOELayer(gate, experts)


def their_gradients(layer: nn.Module) -> list[Tensor]:
    """In the order of our parameters."""
    pick = lambda linear, name: torch.stack([getattr(expert[linear], name).grad for expert in layer.experts])  # noqa: E731
    return [layer.gate.wg.weight.grad, pick(0, "weight"), pick(0, "bias"), pick(2, "weight"), pick(2, "bias")]


def tokens_that_fit(layer: MoEMlp) -> Tensor:
    """(T, D): every expert is chosen 2T/E times, so that nothing drops, but not equally often as the first choice."""
    logits = torch.rand(T, E)
    for t in range(T):
        first, second = t % E, (t + 1) % E
        if t % (2 * E) == 0:  # the balance loss of equal first choices is 1 whatever the gate is
            first, second = second, first
        logits[t, first] += 3
        logits[t, second] += 1.5
    return logits @ torch.linalg.pinv(layer.router.weight.detach()).t()


def run(layer: MoEMlp, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    y, stats = layer(x)
    grads = torch.autograd.grad((y * weight).sum() + stats.loss, [x, *layer.parameters()])
    return y, stats.loss, list(grads)


@pytest.mark.parametrize("dispatcher", ["gshard", "padded", "ragged"])
def test_layer_outputs_loss_and_gradients(alone, dispatcher):
    ours = our_layer(dispatcher)
    theirs = their_layer(ours)
    x, weight = tokens_that_fit(ours), torch.randn(T, D)
    y, loss, grads = run(ours, x, weight)
    assert abs(float(loss.detach()) - 1) > 0.01
    x = x.clone().requires_grad_()
    out = theirs(x.unsqueeze(1)).squeeze(1)
    their_loss = theirs.l_aux * E**2  # theirs is a mean over experts of mean·mean
    ((out * weight).sum() + their_loss).backward()
    torch.testing.assert_close(y, out, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(loss, their_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grads, [x.grad, *their_gradients(theirs)], atol=1e-5, rtol=1e-5)


def test_gate_slots_with_drops():
    """Top2Gate's mask is ours wherever tokens crowd: the same choices, places and drops."""
    layer = our_layer()
    x = torch.randn(T, D)
    routing, plan, _, stats = layer.assign(x, None)
    l_aux, _, mask = top2gate.top2gating(routing.logits)
    assert stats.kept.sum() < stats.routed.sum(), "the case means nothing without drops"
    assert torch.equal(combine_weights(torch.ones_like(routing.gates), routing, plan).bool(), mask)
    torch.testing.assert_close(stats.losses["gshard"], l_aux * E**2)


def test_fairscale_normalises_after_drops_and_we_before(alone):
    layer = our_layer()
    theirs = their_layer(layer)
    x = torch.randn(T, D)
    routing, plan, route, _ = layer.assign(x, None)
    assert plan.kept is not None
    broken = plan.kept.sum(-1) == 1
    assert broken.any(), "the case means nothing unless a token loses one of its choices"
    ours = layer.carry(x, routing, plan, route)
    out = theirs(x.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(ours[~broken], out[~broken], atol=1e-6, rtol=1e-5)
    assert not torch.isclose(ours[broken], out[broken], rtol=1e-2).all(-1).any()
    # Divided after drops, our gates give theirs.
    left = routing.gates * plan.kept
    gates = left / left.sum(-1, keepdim=True).clamp(min=torch.finfo(left.dtype).eps)
    torch.testing.assert_close(layer.carry(x, Routing(**{**vars(routing), "gates": gates}), plan, route), out)


def test_fairscale_draws_its_second_choice(monkeypatch):
    """With its sampler left on, two passes over the same tokens disagree; our layer draws nothing unless asked."""
    monkeypatch.undo()
    logits = torch.randn(T, E)
    masks = [top2gate.top2gating(logits)[2] for _ in range(2)]
    assert not torch.equal(*masks)
    layer, x = our_layer(), torch.randn(T, D)
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_fairscale_cannot_compute_in_double_precision(alone):
    layer = our_layer()
    theirs = their_layer(layer).double()
    with pytest.raises(RuntimeError):
        theirs(torch.randn(T, 1, D, dtype=torch.float64))
    assert layer.double()(torch.randn(T, D, dtype=torch.float64))[0].dtype == torch.float64
