"""Experts by our kernel in C++: the same as operator by operator, and its gradients where they belong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from swinmoe.config import ExpertConfig, MoEConfig
from swinmoe.moe import ExpertWeights, MoEMlp, expert_kernel
from swinmoe.moe.activations import Activation, Gelu, Relu, SwiGlu
from swinmoe.moe.expert_kernel import kernel_mlp, takes, why_not
from swinmoe.moe.expert_mlp import blocked_mlp, expert_mlp, plain_mlp
from swinmoe.moe.experts import Experts, GeluExperts, ReluExperts, SwiGluExperts
from swinmoe.moe.types import ExpertFn
from swinmoe.parallel.expert_parameter import ExpertParameter

pytestmark = pytest.mark.usefixtures("expert_kernel")

COUNTS = [[10, 0, 7], [5, 15, 0]]
Way = Callable[[Tensor, ExpertWeights], Tensor]


def make(dtype: torch.dtype = torch.float32, biases: bool = True) -> tuple[Tensor, ExpertWeights]:
    torch.manual_seed(0)
    sizes = ((37, 24), (3, 40, 24), (3, 40), (3, 24, 40), (3, 24))
    x, fc1, b1, fc2, b2 = (nn.Parameter((torch.randn(size) / 4).to(dtype)) for size in sizes)
    return x, ExpertWeights(fc1, b1 if biases else None, fc2, b2 if biases else None)


def all_of(x: Tensor, w: ExpertWeights) -> list[Tensor]:
    return [t for t in (x, w.fc1, w.b1, w.fc2, w.b2) if t is not None]


def by_kernel(x: Tensor, w: ExpertWeights) -> Tensor:
    return kernel_mlp(x, COUNTS, w, Gelu())


def gradients(way: Way, dtype: torch.dtype = torch.float32, biases: bool = True) -> list[Tensor]:
    """Of two backward passes, the second of which finds `.grad` there."""
    x, w = make(dtype, biases)
    slope = torch.linspace(-1, 1, x.numel(), dtype=dtype).view_as(x)
    for _ in range(2):
        way(x, w).backward(slope)
    return [t.grad.double() for t in all_of(x, w) if t.grad is not None]


def operators(x: Tensor, w: ExpertWeights) -> Tensor:
    return plain_mlp(x, COUNTS, w, Gelu(), 0.0)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("activation", [Gelu(), Relu()], ids=["gelu", "relu"])
def test_equals_operators_in_double_precision(activation: Activation, biases: bool) -> None:
    mine = gradients(lambda x, w: kernel_mlp(x, COUNTS, w, activation), biases=biases)
    other = gradients(lambda x, w: plain_mlp(x, COUNTS, w, activation, 0.0), torch.float64, biases)
    assert len(mine) == (5 if biases else 3)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_and_offloaded_it_is_the_same_to_the_bit(dropout: float) -> None:
    def plainly(x: Tensor, w: ExpertWeights) -> Tensor:
        return kernel_mlp(x, COUNTS, w, Gelu(), dropout)

    def recomputed(x: Tensor, w: ExpertWeights) -> Tensor:
        out: Tensor = checkpoint(plainly, x, w, use_reentrant=False)
        return out

    def offloaded(x: Tensor, w: ExpertWeights) -> Tensor:
        with save_on_cpu():
            return plainly(x, w)

    expected = gradients(plainly)
    torch.testing.assert_close(gradients(recomputed), expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(offloaded), expected, rtol=0, atol=0)


def test_dropout_follows_the_global_generator() -> None:
    """Other units each time, the same again from the same state; none without dropout, which draws nothing."""
    x, w = make()
    torch.manual_seed(1)
    first, second = (kernel_mlp(x, COUNTS, w, Gelu(), 0.5) for _ in range(2))
    torch.manual_seed(1)
    torch.testing.assert_close(kernel_mlp(x, COUNTS, w, Gelu(), 0.5), first, rtol=0, atol=0)
    by_kernel(x, w)
    torch.testing.assert_close(kernel_mlp(x, COUNTS, w, Gelu(), 0.5), second, rtol=0, atol=0)
    assert not torch.allclose(first, second)


def test_weight_gradients_are_added_in_place() -> None:
    x, w = make()
    by_kernel(x, w).sum().backward()
    places = [w.fc1.grad, w.fc2.grad]
    before = [t.clone() for t in places if t is not None]
    by_kernel(x, w).sum().backward()
    assert w.fc1.grad is places[0] and w.fc2.grad is places[1]
    torch.testing.assert_close([w.fc1.grad, w.fc2.grad], [2 * t for t in before])


def test_grad_of_any_layout_is_added_to() -> None:
    x, w = make()
    by_kernel(x, w).sum().backward()
    assert w.fc1.grad is not None
    once = w.fc1.grad.clone()
    w.fc1.grad = torch.ones_like(once).transpose(1, 2).contiguous().transpose(1, 2)
    place = w.fc1.grad
    by_kernel(x, w).sum().backward()
    assert w.fc1.grad is place and not place.is_contiguous()
    torch.testing.assert_close(place, once + 1)


def test_autograd_grad_leaves_grad_alone() -> None:
    x, w = make()
    by_kernel(x, w).sum().backward()
    assert w.fc1.grad is not None
    before = w.fc1.grad.clone()
    found = torch.autograd.grad(by_kernel(x, w).sum(), [w.fc1])[0]
    torch.testing.assert_close([w.fc1.grad, found], [before, before], rtol=0, atol=0)


def test_hooks_see_gradients() -> None:
    x, w = make()
    by_kernel(x, w).sum().backward()
    assert w.fc1.grad is not None
    once, seen = w.fc1.grad.clone(), []
    w.fc1.register_hook(seen.append)
    by_kernel(x, w).sum().backward()
    torch.testing.assert_close(seen, [once], rtol=0, atol=0)
    torch.testing.assert_close(w.fc1.grad, 2 * once)


def test_graphs_that_hold_grad_notice_that_it_changed() -> None:
    x, w = make()
    by_kernel(x, w).sum().backward()
    scale = torch.ones((), requires_grad=True)
    assert w.fc1.grad is not None
    loss = (scale * w.fc1.grad).sum()
    by_kernel(x, w).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_saved_rows_may_come_back_otherwise_laid_out() -> None:
    def turned(t: Tensor) -> Tensor:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t

    def hooked(x: Tensor, w: ExpertWeights) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(turned, lambda t: t):
            return by_kernel(x, w)

    torch.testing.assert_close(gradients(hooked), gradients(by_kernel), rtol=0, atol=0)


@pytest.mark.parametrize("frozen", range(5))
def test_what_is_frozen_gets_none(frozen: int) -> None:
    x, w = make()
    tensors = all_of(x, w)
    tensors[frozen].requires_grad_(False)
    by_kernel(x, w).sum().backward()
    expected = torch.autograd.grad(operators(x, w).sum(), [t for t in tensors if t.requires_grad])
    assert tensors[frozen].grad is None
    torch.testing.assert_close([t.grad for t in tensors if t.requires_grad], list(expected), rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_where_no_backward_pass_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = expert_kernel.expert_mlp_forward
    monkeypatch.setattr(expert_kernel, "expert_mlp_forward", lambda *given: asked.append(given[-3]) or real(*given))
    x, w = make()
    with torch.no_grad():
        by_kernel(x, w)
    by_kernel(x, w)
    assert asked == [False, True]


@pytest.mark.parametrize(
    "way", [by_kernel, lambda x, w: blocked_mlp(x, COUNTS, w, Gelu(), 0.0)], ids=["kernel", "blocks"]
)
@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["sum", "squares"])
def test_second_derivatives_are_refused(loss: Callable[[Tensor], Tensor], way: Way) -> None:
    """Of a plain sum too, whose gradient needs none itself."""
    x, w = make()
    grad = torch.autograd.grad(loss(way(x, w)), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


class MyGelu(Gelu):
    """A user's own, which the kernel does not know."""


@pytest.mark.parametrize(
    "case",
    ["dtype", "swiglu", "activation of one's own", "autocast", "strides", "fake", "no compiler"],
)
def test_takes_only_what_it_computes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = make()
    assert takes(x, w, Gelu()) and takes(x, w, Relu())
    match case:
        case "dtype":
            assert not takes(*make(torch.float64), Gelu())
        case "swiglu":
            assert not takes(x, w, SwiGlu())
        case "activation of one's own":
            assert not takes(x, w, MyGelu())
        case "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert not takes(x, w, Gelu())
        case "strides":
            turned = w.fc1.detach().transpose(1, 2).contiguous().transpose(1, 2)
            assert not takes(x, ExpertWeights(turned, w.b1, w.fc2, w.b2), Gelu())
            assert "laid out otherwise" in why_not(ExpertWeights(turned, w.b1, w.fc2, w.b2), Gelu())
        case "fake":
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
                assert not takes(torch.zeros(37, 24), w, Gelu())
        case "no compiler":
            monkeypatch.setattr(expert_kernel, "why_no_kernels", lambda: "no compiler")
            assert not takes(x, w, Gelu())


def test_experts_spread_over_ranks_take_it_too() -> None:
    """Their parameters are of a type of their own, and numbers in memory all the same."""
    x, w = make()
    spread = ExpertWeights(*(ExpertParameter(t.detach()) for t in all_of(x, w)[1:]))
    assert takes(x, spread, Gelu()) and why_not(spread, Gelu()) == ""
    for weights in (w, spread):
        by_kernel(x, weights).sum().backward()
    found, expected = ([t.grad for t in all_of(x, weights)[1:]] for weights in (spread, w))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("dropout", "native", "taken"), [(0.0, True, 1), (0.1, True, 1), (0.0, False, 0)])
def test_experts_take_it_where_they_may(
    dropout: float, native: bool, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr("swinmoe.moe.expert_mlp.kernel_mlp", lambda *given: calls.append(1) or kernel_mlp(*given))
    x, w = make()
    expert_mlp(x, torch.tensor(COUNTS), w, Gelu(), dropout, native)
    assert len(calls) == taken


@pytest.mark.parametrize("dispatcher", ["ragged", "padded"])
def test_layers_take_it_by_themselves(dispatcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr("swinmoe.moe.expert_mlp.kernel_mlp", lambda *given: taken.append(1) or kernel_mlp(*given))
    layer = MoEMlp(MoEConfig(num_experts=4, dispatcher=dispatcher), dim=24, hidden_dim=40)
    x = torch.randn(50, 24)
    y = layer(x)[0]
    assert taken == [1]
    layer.experts.native = False
    torch.testing.assert_close(layer(x)[0], y, rtol=1e-5, atol=1e-6)
    assert taken == [1]


class OfTheirOwn(GeluExperts):
    """Experts that compute something else."""

    def function(self, training: bool) -> ExpertFn:
        return lambda rows, segments, w: rows


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        (GeluExperts, {}, ""),
        (ReluExperts, {}, ""),
        (SwiGluExperts, {}, "it has gelu and relu between the layers, and they SwiGlu"),
        (OfTheirOwn, {}, "they compute in a way of their own"),
        (GeluExperts, {"dtype": torch.float64}, "it takes float32, and they are float64"),
        (GeluExperts, {"device": "meta"}, "it is for CPUs, and they are on meta"),
    ],
)
def test_experts_know_why_they_do_not_take_it(
    kind: type[Experts], change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = kind(ExpertConfig(), num_experts=2, dim=4, hidden=4, name="", seed=0, init_std=0.02, **change)
    assert made.why_no_kernel() == reason
    if not reason:
        monkeypatch.setattr("swinmoe.moe.expert_kernel.why_no_kernels", lambda: "no compiler")
        assert made.why_no_kernel() == "no compiler"
        made.native = False
        assert made.why_no_kernel() == "they were told not to take it"
