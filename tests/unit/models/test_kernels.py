"""Models with our kernels in C++: the same training step, in graphs too, and where they are not taken."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from micro import two_stages
from torch import Tensor, nn
from torch.autograd import forward_ad

from swinmoe import native
from swinmoe.config import MoEConfig
from swinmoe.errors import BackendUnavailableError
from swinmoe.models import (
    SwinTransformer,
    attention,
    build_model,
    compile_blocks,
    leave_native_kernels,
    mlp,
    use_native_kernels,
)
from swinmoe.models.compile import Compiled
from swinmoe.moe import Experts, expert_mlp

pytestmark = [
    pytest.mark.usefixtures("expert_kernel"),
    # Dynamo looks at `.grad` of every input, also of a map that comes from the block before.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
IMAGES = torch.randn(2, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
"""No multiple of the window: maps are padded and shifted."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(style: str, dtype: torch.dtype = torch.float32, **over: object) -> SwinTransformer:
    return build_model(two_stages(style, 20, **over), dtype=dtype).train()


def outcome(model: SwinTransformer) -> list[Tensor]:
    """Logits and all gradients of a training step; draws restarted."""
    torch.manual_seed(5)
    model.zero_grad()
    dtype = model.norm.weight.dtype
    keeps = model._draw_keeps
    with pytest.MonkeyPatch.context() as patch:  # drawn in single precision, whatever the model is
        patch.setattr(model, "_draw_keeps", lambda x: [k if k is None else k.to(dtype) for k in keeps(x.float())])
        out = model(IMAGES.to(dtype))
    (out.logits.square().sum() + out.aux_loss).backward()
    return [out.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_near(got: list[Tensor], expected: list[Tensor]) -> None:
    for mine, other in zip(got, expected, strict=True):
        difference = (mine.double() - other.double()).abs().max()
        assert difference <= 1e-4 * other.abs().max().clamp(min=1e-3), (tuple(mine.shape), difference)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels, each time one is called from a module."""
    called: list[str] = []

    def watch(module: Any, name: str) -> None:
        original = getattr(module, name)

        def spy(*given: Any) -> Any:
            called.append(name)
            return original(*given)

        monkeypatch.setattr(module, name, spy)

    watch(attention, "window_attention")
    watch(mlp, "biased_gelu")
    watch(expert_mlp, "kernel_mlp")
    watch(native, "line_up")
    watch(native, "sum_choices")
    watch(native, "add_product")
    return called


@pytest.mark.parametrize("over", [{}, {"grad_checkpointing": True}, {"moe": MoEConfig(num_experts=4), "sparse": True}])
@pytest.mark.parametrize("style", ["v1", "v2", "swin_moe"])
def test_a_step_is_that_of_double_precision(style: str, over: dict[str, object], calls: list[str]) -> None:
    sparse = over.get("sparse", False)
    over = {k: v for k, v in over.items() if k != "sparse"} | ({"moe_blocks": ((1,), (1,))} if sparse else {})
    model, exact = model_of(style, **over), model_of(style, torch.float64, **over)
    use_native_kernels(model)
    assert_near(outcome(model), outcome(exact))
    forwards = 2 if "grad_checkpointing" in over else 1
    assert calls.count("window_attention") == 6 * forwards
    assert calls.count("biased_gelu") == (4 if sparse else 6) * forwards
    assert calls.count("kernel_mlp") == (2 if sparse else 0) * forwards


@pytest.mark.parametrize("style", ["v1", "v2"])
def test_graphs_hold_them(style: str) -> None:
    model, exact, seen = model_of(style), model_of(style, torch.float64), []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    done = compile_blocks(model, backend=backend)
    assert done.no_kernels is None
    assert_near(outcome(model), outcome(exact))
    assert len(seen) == 4  # two stages, shifted or not
    for names in seen:
        assert sum("window_attention" in name for name in names) == 1
        assert sum("biased_gelu" in name for name in names) == 1
        assert not any("roll" in name or "softmax" in name for name in names)


def test_compiled_without_them_where_they_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise BackendUnavailableError("it is raining")

    monkeypatch.setattr("swinmoe.models.kernels.kernels", refuse)
    model = model_of("v1")
    done = compile_blocks(model, backend="aot_eager")
    assert done.no_kernels == "it is raining"
    assert str(done) == "compiles 6 blocks, without our kernels (it is raining)"
    assert not any(m.native for m in model.modules() if isinstance(m, mlp.Mlp))
    assert str(Compiled(("a",), {})) == "compiles 1 blocks"


def test_what_was_chosen_by_hand_stays() -> None:
    model = model_of("v1")
    model.set_attention_impl("explicit")
    use_native_kernels(model)
    assert {m.attention_impl for m in model.modules() if isinstance(m, attention.WindowAttention)} == {"explicit"}


def test_leaving_them_leaves_them_all(calls: list[str]) -> None:
    model = model_of("v2", moe=MoEConfig(num_experts=4), moe_blocks=((1,), (1,)))
    use_native_kernels(model)
    outcome(model)
    assert {"window_attention", "biased_gelu", "kernel_mlp", "line_up", "sum_choices", "add_product"} == set(calls)
    calls.clear()
    leave_native_kernels(model)
    outcome(model)
    assert calls == []


@pytest.mark.parametrize("recomputed", [False, True])
def test_blocks_carry_what_their_router_passes_on(recomputed: bool, calls: list[str]) -> None:
    moe = MoEConfig(num_experts=4)
    model = model_of("v2", moe=moe, moe_blocks=((1,), (1,)), grad_checkpointing=recomputed)
    outcome(model)
    assert calls.count("add_product") == 2


def test_compiling_leaves_experts_as_they_are() -> None:
    model = model_of("v2", moe=MoEConfig(num_experts=4), moe_blocks=((1,), (1,)))
    leave_native_kernels(model)
    compile_blocks(model, backend="eager")
    assert [m.native for m in model.modules() if isinstance(m, Experts)] == [False, False]
    assert all(m.native for m in model.modules() if isinstance(m, mlp.Mlp))


def test_not_taken_where_numbers_are_others(calls: list[str]) -> None:
    for dtype, context in ((torch.float64, nullcontext()), (torch.float32, torch.autocast("cpu", torch.bfloat16))):
        model = model_of("v2", dtype)
        use_native_kernels(model)
        with context:
            outcome(model)
    assert calls == []


def watch_all(_: nn.Module) -> object:
    return nn.modules.module.register_module_forward_hook(lambda *_: None)


def replace_forward(layer: nn.Module) -> None:
    layer.forward = layer.forward  # as those do who wrap it


@pytest.mark.parametrize(
    ("watch", "left"),
    [
        (lambda layer: layer.register_forward_hook(lambda *_: None), 5),
        (lambda layer: layer.register_full_backward_hook(lambda *_: None), 5),
        (replace_forward, 5),
        (watch_all, 0),
    ],
)
def test_a_layer_that_is_watched_is_called(watch: Callable[[nn.Module], Any], left: int, calls: list[str]) -> None:
    model = model_of("v1")
    use_native_kernels(model)
    handle = watch(model.layers[0].blocks[0].mlp.fc1)
    try:
        outcome(model)
    finally:
        if handle is not None:
            handle.remove()
    assert calls.count("biased_gelu") == left


def test_not_taken_where_weights_are_dropped_or_windows_in_chunks(calls: list[str]) -> None:
    model = model_of("v1", attn_drop_rate=0.1)
    use_native_kernels(model)
    outcome(model)
    assert calls.count("window_attention") == 0
    model.eval()(IMAGES.float())  # nothing is dropped
    assert calls.count("window_attention") == 6
    calls.clear()
    model.set_attention_chunks(2)
    model(IMAGES.float())
    assert calls.count("window_attention") == 0


def test_not_taken_where_a_trace_is_made(calls: list[str]) -> None:
    """It may be loaded where there is no swinmoe."""
    layer = mlp.Mlp(4, 8)
    use_native_kernels(layer)
    torch.jit.trace(layer.eval(), torch.randn(2, 4), check_trace=False)
    assert calls == []


def test_what_refusals_advise_works() -> None:
    """Second and forward-mode derivatives of a whole model, after one reading of either message."""
    model, x = model_of("v2").eval(), IMAGES.float()
    use_native_kernels(model)

    def second() -> Tensor:
        y = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(y).logits.sum(), y, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), y)[0]

    def forward() -> Tensor | None:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x))).logits).tangent

    advice = r"attention_impl='explicit' on .* and native=False on its MLPs"
    for derivative in (second, forward):
        with pytest.raises(NotImplementedError, match=advice):
            derivative()
    model.set_attention_impl("explicit")
    for module in model.modules():
        if isinstance(module, mlp.Mlp):
            module.native = False
    assert second().any()
    assert forward() is not None


def test_copies_take_them_too(calls: list[str]) -> None:
    model = model_of("v1")
    use_native_kernels(model)
    copied = copy.deepcopy(model).eval()
    torch.testing.assert_close(copied(IMAGES.float()).logits, model.eval()(IMAGES.float()).logits, rtol=0, atol=0)
    assert calls.count("window_attention") == 12


def test_elsewhere_than_on_a_cpu_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(BackendUnavailableError, match=r"on meta.*train\.native_kernels"):
        use_native_kernels(model)


def test_kernels_are_never_asked_for_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model needs no compiler unless it is told to take them."""

    def refuse() -> None:
        raise AssertionError("compiled without being asked")

    for module in ("attention", "gelu"):
        monkeypatch.setattr(f"swinmoe.native.{module}.kernels", refuse)
    outcome(model_of("v1"))
