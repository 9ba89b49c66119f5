"""The expert layer against plain loops: outputs and all gradients, over shapes, policies and layouts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swinmoe.config import BalanceLossConfig, CapacityConfig, CapacityPolicy, ExpertConfig, MoEConfig, RouterConfig
from swinmoe.moe import MoEMlp
from tests.numerics.moe_oracle import loop_moe

TOLERANCE = 1e-10


def random_layer(cfg: MoEConfig, dim: int, hidden: int, seed: int) -> MoEMlp:
    layer = MoEMlp(cfg, dim=dim, hidden_dim=hidden, dtype=torch.float64)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=gen, dtype=p.dtype) / p.shape[-1] ** 0.5)
        if layer.router.expert_bias is not None:
            layer.router.expert_bias.copy_(torch.randn(cfg.num_experts, generator=gen) * 0.3)
    return layer


def gradients(y: Tensor, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    if not y.requires_grad:
        return [torch.zeros_like(i) for i in inputs]
    got = torch.autograd.grad(y, inputs, weight, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(got, inputs, strict=True)]


def compare(layer: MoEMlp, x: Tensor, noise: Tensor | None = None) -> None:
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y, stats = layer(x, noise)
    want, routed, kept = loop_moe(layer, x, noise)
    assert stats.routed.tolist() == routed
    assert stats.kept.tolist() == kept
    assert int(stats.tokens) == len(x)
    assert (stats.expert_ids >= 0).sum() == sum(kept)
    torch.testing.assert_close(y, want, atol=TOLERANCE, rtol=0)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    got = torch.autograd.grad(y, inputs, weight, retain_graph=True)  # raises if any parameter is left out of the graph
    for g, w in zip(got, gradients(want, inputs, weight), strict=True):
        torch.testing.assert_close(g, w, atol=TOLERANCE, rtol=0)


@st.composite
def cases(draw):
    num_experts = draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["fixed", "bounded", "dropless"]))
    policy = CapacityPolicy(
        kind=kind, factor=draw(st.sampled_from([0.3, 0.5, 1.0, 1.25, 3.0])), min_slots=draw(st.integers(0, 2))
    )
    cfg = MoEConfig(
        num_experts=num_experts,
        top_k=draw(st.integers(1, min(3, num_experts))),
        dispatcher=draw(st.sampled_from(["ragged", "padded", "gshard", "auto"])),
        router=RouterConfig(
            batch_prioritized=draw(st.booleans()),
            score=draw(st.sampled_from(["softmax", "sigmoid"])),
            normalize_gates=draw(st.booleans()),
            bias_update_rate=draw(st.sampled_from([0.0, 0.1])),
        ),
        capacity=CapacityConfig(train=policy, eval=CapacityPolicy(kind="dropless")),
        experts=ExpertConfig(
            type=draw(st.sampled_from(["gelu", "relu", "swiglu"])),
            hidden_ratio=draw(st.sampled_from([None, 0.5])),
            fc1_bias=draw(st.booleans()),
            fc2_bias=draw(st.sampled_from(["learned", "frozen-zero", "none"])),
        ),
        shared_expert_ratio=draw(st.sampled_from([0.0, 0.5])),
    )
    tokens = draw(st.sampled_from([0, 1, 2, 3, 5, 8, 17]))
    return (
        cfg,
        tokens,
        draw(st.integers(1, 6)),
        draw(st.integers(1, 7)),
        draw(st.booleans()),
        draw(st.integers(0, 10**6)),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_equals_loops_over_tokens(case):
    cfg, tokens, dim, hidden, training, seed = case
    layer = random_layer(cfg, dim, hidden, seed).train(training)
    x = torch.randn(tokens, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    compare(layer, x)


@pytest.mark.parametrize("dispatcher", ["ragged", "padded"])
@pytest.mark.parametrize("kind", ["fixed", "bounded", "dropless"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_all_tokens_to_one_expert(dispatcher, kind, top_k):
    policy = CapacityPolicy(kind=kind, factor=1.0)
    cfg = MoEConfig(num_experts=4, top_k=top_k, dispatcher=dispatcher, capacity=CapacityConfig(train=policy))
    layer = random_layer(cfg, 3, 5, seed=1)
    x = torch.rand(11, 3, dtype=torch.float64) + 0.5
    with torch.no_grad():
        layer.router.weight[:2] *= 0.1
        layer.router.weight[3] *= 0.1
        layer.router.weight[2] = 3
    compare(layer, x.requires_grad_())
    _, stats = layer(x)
    assert stats.routed[2] == 11
    assert stats.kept[2] == (11 if kind == "dropless" else 3 * top_k)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_dropless_drops_nothing(tokens, num_experts, data):
    """Batch-prioritised too, where Tutel under-sizes its buffers and drops (its dispatch with BPR and capacity 0)."""
    cfg = MoEConfig(
        num_experts=num_experts,
        top_k=data.draw(st.integers(1, num_experts)),
        dispatcher=data.draw(st.sampled_from(["ragged", "padded"])),
        router=RouterConfig(batch_prioritized=data.draw(st.booleans())),
    )
    layer = random_layer(cfg, 2, 3, seed=tokens)
    _, stats = layer(torch.randn(tokens, 2, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64))
    assert torch.equal(stats.kept, stats.routed)
    assert stats.kept.sum() == tokens * cfg.top_k
    assert (stats.expert_ids >= 0).all()


def test_noise_changes_the_choice_and_the_gate():
    cfg = MoEConfig(num_experts=4, top_k=2, router=RouterConfig(noise=4.0))
    layer = random_layer(cfg, 3, 5, seed=2)
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    noise = layer.draw_noise(9, "cpu")
    compare(layer, x, noise)
    assert not torch.allclose(layer(x, noise)[0], layer.eval()(x)[0])


@pytest.mark.parametrize("dispatcher", ["ragged", "padded"])
@pytest.mark.parametrize("policy", ["dropless", "fixed"])
@pytest.mark.parametrize("router", ["linear", "cosine"])
@pytest.mark.parametrize("expert", ["gelu", "swiglu"])
def test_gradcheck_through_the_whole_layer(dispatcher, policy, router, expert):
    cfg = MoEConfig(
        num_experts=3,
        top_k=2,
        dispatcher=dispatcher,
        router=RouterConfig(type=router, proj_dim=3, noise=1.0, normalize_gates=True),
        capacity=CapacityConfig(train=CapacityPolicy(kind=policy, factor=0.7)),
        losses=BalanceLossConfig(gshard=0.3, importance_load=0.2, z=0.1, importance_load_tutel=0.1),
        experts=ExpertConfig(type=expert),
    )
    layer = random_layer(cfg, 2, 3, seed=3)
    gen = torch.Generator().manual_seed(4)
    x = torch.randn(6, 2, generator=gen, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(6, 3, generator=gen, dtype=torch.float64) / 3

    def run(x, *_):
        y, stats = layer(x, noise)
        return y, stats.loss

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))
