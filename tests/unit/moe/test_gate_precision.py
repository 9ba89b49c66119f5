"""Whatever the rest of a model computes in, its gates score in float32 at least."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from swinmoe.config import MoEConfig, RouterConfig
from swinmoe.models import SwinTransformer, create_model
from swinmoe.moe import MoEMlp, precision, routers
from swinmoe.moe.types import Routing
from swinmoe.runtime import use_tf32

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
AROUND: dict[str, Any] = {
    "fp32": nullcontext,
    "fp64": nullcontext,
    "bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "fp16": lambda: torch.autocast("cpu", dtype=torch.float16),
}


def model_of(router: str, name: str) -> tuple[SwinTransformer, Tensor]:
    model = create_model("swin_moe_micro", num_classes=5, moe={"router": {"type": router}})
    dtype = torch.float64 if name == "fp64" else torch.float32
    model = model.to(dtype)
    model.prepare_tables()
    return model, IMAGES.to(dtype)


def watched(model: SwinTransformer) -> list[tuple[MoEMlp, Tensor, Routing]]:
    """Fills with (layer, tokens, routing) of every gate, as it is passed."""
    seen: list[tuple[MoEMlp, Tensor, Routing]] = []
    for layer in model.moe_layers().values():
        layer.router.register_forward_hook(lambda _, args, out, layer=layer: seen.append((layer, args[0], out)))
    return seen


@pytest.mark.parametrize("router", ["linear", "cosine"])
@pytest.mark.parametrize("name", AROUND)
def test_gates_score_in_float32_at_least(name: str, router: str) -> None:
    """Their logits are those of exact arithmetic on the tokens they were given, to float32's precision."""
    model, images = model_of(router, name)
    seen = watched(model.train())
    with AROUND[name]():
        model(images)
    assert len(seen) == len(model.moe_layers()) > 0
    wide, tolerance = (torch.float64, 1e-12) if name == "fp64" else (torch.float32, 3e-6)
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
    for layer, tokens, routing in seen:
        assert {t.dtype for t in (routing.logits, routing.probs, routing.gates)} == {wide}
        exact = layer.router.double().score(tokens.double()).detach()
        assert float((routing.logits.detach() - exact).abs().max()) < tolerance * max(1.0, float(exact.abs().max()))
        if low is not None:  # in the low precision they would be far off: the bound above means something
            coarse = layer.router.to(low).score(tokens.to(low))
            assert float((coarse.detach().double() - exact).abs().max()) > 30 * tolerance * float(exact.abs().max())


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_under_autocast_has_gradients(dtype: torch.dtype, low: torch.dtype) -> None:
    """Of the dtype that its tokens and weights have, whatever the product was taken in."""
    layer = MoEMlp(MoEConfig(num_experts=4, router=RouterConfig(fp32=False)), dim=16, hidden_dim=32, dtype=dtype)
    tokens = torch.randn(50, 16, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=low):
        y, _ = layer(tokens)
    y.float().sum().backward()
    for leaf in (tokens, layer.router.weight):
        assert leaf.grad is not None and leaf.grad.dtype == dtype and leaf.grad.abs().sum() > 0


def test_the_gates_derivatives_are_right() -> None:
    """Also second ones, of a product of its own."""
    x, weight = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (5, 3))
    assert torch.autograd.gradcheck(routers._Logits.apply, (x, weight))
    assert torch.autograd.gradgradcheck(routers._Logits.apply, (x, weight))
    assert torch.autograd.gradcheck(routers._LogitsAndTokens.apply, (x, weight))
    assert torch.autograd.gradgradcheck(routers._LogitsAndTokens.apply, (x, weight))


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("frozen", ["", "tokens", "gate"])
@pytest.mark.parametrize("used", ["both", "logits", "tokens"])
def test_tokens_passed_on_by_the_router_have_both_gradients(used: str, frozen: str) -> None:
    """Whichever of the two outputs has a gradient, and whoever needs one; against float64."""
    x, weight = (
        torch.randn(70, 37, requires_grad=frozen != "tokens"),
        torch.randn(5, 37, requires_grad=frozen != "gate"),
    )
    slopes = {"logits": torch.randn(70, 5), "tokens": torch.randn(70, 37)}
    found = []
    for convert in (Tensor.float, Tensor.double):
        wide, gate = (convert(t.detach()).requires_grad_(t.requires_grad) for t in (x, weight))
        outputs = dict(zip(slopes, routers._LogitsAndTokens.apply(wide, gate), strict=True))
        if convert == Tensor.double:
            outputs = {"logits": wide @ gate.t(), "tokens": wide}
        names = [n for n in slopes if used in (n, "both") and outputs[n].requires_grad]
        if names:
            torch.autograd.backward([outputs[n] for n in names], [convert(slopes[n]) for n in names])
        found.append((wide.grad, gate.grad))
    for mine, other in zip(*found, strict=True):
        # What depends on nothing that needs a gradient has one here all the same: of zeros, or none.
        assert other is not None or mine is None or not mine.any()
        if other is not None:
            torch.testing.assert_close(mine, other, check_dtype=False, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("native_kernels")
def test_a_layer_carries_what_its_router_passes_on() -> None:
    """And its gradients are those of a layer that may not take our kernels; k 2, shared expert, so that tokens are used
    three times."""
    cfg = MoEConfig(num_experts=4, top_k=2, shared_expert_ratio=0.5)
    tokens, slope = torch.randn(50, 16), torch.randn(50, 16)
    found = []
    for native in (True, False):
        layer = MoEMlp(cfg, dim=16, hidden_dim=32)
        layer.native = layer.router.native = layer.experts.native = layer.shared.native = native
        x = tokens.clone().requires_grad_()
        assert (layer.assign(x, None)[0].passed is not None) == native
        y, stats = layer(x)
        torch.autograd.backward([y, stats.loss], [slope, None])
        found.append((y, x.grad, layer.router.weight.grad))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


class Detached(routers.LinearRouter):
    def forward(self, x: Tensor, noise: Tensor | None = None) -> Routing:
        return super().forward(x.detach(), noise)


class Scaled(routers.LinearRouter):
    def forward(self, x: Tensor, noise: Tensor | None = None) -> Routing:
        return super().forward(1.5 * x, noise)


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("kind", [Detached, Scaled, "hook"])
def test_experts_carry_the_layers_tokens_whatever_its_router_scores(kind: Any) -> None:
    tokens, slope = torch.randn(50, 16), torch.randn(50, 16)
    found = []
    for native in (True, False):
        layer = MoEMlp(MoEConfig(num_experts=4), dim=16, hidden_dim=32)
        layer.router.native = native
        if kind == "hook":
            layer.router.register_forward_pre_hook(lambda _, given: (1.5 * given[0], *given[1:]))
        else:
            layer.router.__class__ = kind
        x = tokens.clone().requires_grad_()
        assert layer.assign(x, None)[0].passed is None
        y, stats = layer(x)
        torch.autograd.backward([y, stats.loss], [slope, None])
        found.append((y, x.grad, layer.router.weight.grad))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("native_kernels")
def test_tokens_without_a_gradient_get_none() -> None:
    """What needs none is passed on by nobody: experts would compute a gradient of rows that nobody wants."""
    layer, tokens = MoEMlp(MoEConfig(num_experts=4), dim=16, hidden_dim=32), torch.randn(9, 16)
    assert layer.router(tokens).passed is None
    with torch.no_grad():
        assert layer.router(tokens.requires_grad_()).passed is None
    assert layer.router(tokens).passed is not None


@pytest.mark.usefixtures("native_kernels")
def test_a_routers_own_score_is_taken() -> None:
    class Doubled(routers.LinearRouter):
        def score(self, x: Tensor) -> Tensor:
            return 2 * super().score(x)

    layer = MoEMlp(MoEConfig(num_experts=4), dim=16, hidden_dim=32)
    tokens = torch.randn(9, 16, requires_grad=True)
    plain = layer.router(tokens)
    layer.router.__class__ = Doubled
    routing = layer.router(tokens)
    torch.testing.assert_close(routing.logits, 2 * plain.logits)
    assert routing.passed is None and plain.passed is not None


def rounded(x: Tensor) -> Tensor:
    """As a GPU's tensor cores see float32 operands in TensorFloat-32: 10 bits of mantissa."""
    bits = x.detach().float().view(torch.int32)
    low = torch.bitwise_and(torch.bitwise_right_shift(bits, 13), 1) + 0x0FFF
    return torch.bitwise_and(bits + low, ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("fp32", [True, False])
def test_the_gate_goes_round_tf32(monkeypatch: pytest.MonkeyPatch, fp32: bool) -> None:
    """A pretended GPU that rounds float32 products and no others: never run on a real one."""
    layer = MoEMlp(MoEConfig(num_experts=4, router=RouterConfig(fp32=fp32)), dim=16, hidden_dim=32)
    tokens = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    exact = layer.router.score(tokens).detach()
    linear = torch.nn.functional.linear

    def on_tensor_cores(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        if x.dtype == torch.float32:
            return linear(rounded(x), rounded(w), b)
        return linear(x, w, b)

    monkeypatch.setattr(routers.F, "linear", on_tensor_cores)
    monkeypatch.setattr(routers, "rounds_products", lambda _: True)
    monkeypatch.setattr(routers, "_eager_on_cpu", lambda _: False)
    routing = layer.router(tokens)
    off = float((routing.logits.detach() - exact).abs().max() / exact.abs().max())
    assert routing.logits.dtype == routing.gates.dtype == torch.float32
    assert off < 1e-6 if fp32 else off > 1e-4
    if fp32:
        routing.gates.sum().backward()
        assert layer.router.weight.grad is not None and layer.router.weight.grad.dtype == torch.float32


@pytest.fixture
def switches() -> Iterator[None]:
    """Puts back what the process had."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("switches")
def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tf32(True)
    assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == ("high" if torch.cuda.is_available() else "highest")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    use_tf32(True)
    assert torch.get_float32_matmul_precision() == "high"
    assert not precision.rounds_products(torch.ones(1))  # of a CPU
    use_tf32(False)
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
