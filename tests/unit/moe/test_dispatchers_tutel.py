"""Tutel's kernels beside our own layouts, where Tutel is installed: same plan, same numbers, clear refusals."""

import copy

import pytest
import torch

from swinmoe.config import CapacityConfig, CapacityPolicy, ExpertConfig, MoEConfig, RouterConfig
from swinmoe.errors import RoutingError
from swinmoe.moe import MoEMlp

pytest.importorskip("tutel.moe", reason="Tutel is not installed")


def make(dispatcher: str, kind: str = "fixed", *, top_k: int = 2, min_slots: int = 1, **router) -> MoEMlp:
    cfg = MoEConfig(
        num_experts=4,
        top_k=top_k,
        dispatcher=dispatcher,
        router=RouterConfig(**router),
        capacity=CapacityConfig(train=CapacityPolicy(kind=kind, factor=0.75, min_slots=min_slots)),
        experts=ExpertConfig(type="swiglu"),
    )
    return MoEMlp(cfg, dim=6, hidden_dim=8, init_std=1.0)


def run(layer: MoEMlp, x: torch.Tensor, autocast: torch.dtype | None = None) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y, stats = layer(x)
    loss = y.float().square().sum() + stats.loss
    return [y, *torch.autograd.grad(loss, [x, *layer.parameters()])]


@pytest.mark.parametrize("kind", ["fixed", "bounded", "dropless"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("prioritized", [False, True])
def test_equals_our_padded_layout(kind, top_k, prioritized):
    settings = {"top_k": top_k, "batch_prioritized": prioritized, "normalize_gates": True}
    layer, x = make("tutel", kind, **settings), torch.randn(23, 6)
    _, stats = layer(x)
    assert (stats.kept.sum() < stats.routed.sum()) == (kind != "dropless")
    torch.testing.assert_close(run(layer, x), run(make("padded", kind, **settings), x), atol=1e-5, rtol=1e-5)


def test_sigmoid_gates_and_biased_choice():
    settings = {"score": "sigmoid", "bias_update_rate": 0.1}
    layers, x = [make(name, **settings) for name in ("tutel", "padded")], torch.randn(23, 6)
    for layer in layers:
        layer.update_bias(torch.tensor([9, 3, 0, 0]))
    torch.testing.assert_close(run(layers[0], x), run(layers[1], x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_tokens(dtype):
    """Tutel's CPU kernels know float32 alone; its own route for float16 fails in decode."""
    x = torch.randn(23, 6).to(dtype)
    ours, theirs = (run(make(name).to(dtype), x) for name in ("padded", "tutel"))
    assert theirs[0].dtype == dtype
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=float(a.detach().abs().max()) * 2**-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x = torch.randn(23, 6)
    ours, theirs = (run(make(name), x, autocast=dtype) for name in ("padded", "tutel"))
    assert theirs[0].dtype == dtype
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=float(a.detach().abs().max()) * 2**-6, rtol=0)


@pytest.mark.parametrize(("tokens", "min_slots"), [(0, 1), (0, 0), (3, 0), (1, 1)])
def test_no_tokens_and_no_slots(tokens, min_slots):
    """Tutel itself fails on both."""
    layer = make("tutel", min_slots=min_slots)
    y, stats = layer(torch.randn(tokens, 6))
    (y.sum() + stats.loss).backward()
    assert y.shape == (tokens, 6)
    assert all(p.grad is not None for p in layer.parameters())


def test_double_precision_is_refused():
    with pytest.raises(RoutingError, match=r"float64.*cut them to float32.*ragged, padded or gshard"):
        make("tutel").double()(torch.randn(5, 6, dtype=torch.float64))


def test_the_layer_can_be_copied_after_a_forward():
    layer = make("tutel")
    y, _ = layer(torch.randn(9, 6))
    twin = copy.deepcopy(layer)
    y.sum().backward()
    x = torch.randn(9, 6)
    assert torch.equal(twin(x)[0], layer(x)[0])
