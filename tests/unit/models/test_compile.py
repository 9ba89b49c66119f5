"""Blocks compiled one by one: one graph for each stage and shift, no breaks, the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from micro import two_stages
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from swinmoe.config import BalanceLossConfig, CapacityConfig, CapacityPolicy, MoEConfig, RouterConfig
from swinmoe.models import SwinTransformer, build_model, compile_blocks
from swinmoe.models.layers import project

# Dynamo looks at `.grad` of every input, also of a map that comes from the block before.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

FIXED = CapacityPolicy(kind="fixed", factor=0.75)
PADDED = MoEConfig(
    num_experts=4,
    top_k=2,
    dispatcher="padded",
    capacity=CapacityConfig(train=FIXED, eval=FIXED),
    router=RouterConfig(noise=1.0, batch_prioritized=True),
    losses=BalanceLossConfig(importance_load=0.1),
)
IMAGES = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(style: str, **over: Any) -> SwinTransformer:
    return build_model(two_stages(style, 16, **over), dtype=torch.float64).train()


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0
        self.called: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        self.graphs += 1
        self.called += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        return lookup_backend("aot_eager")(graph, inputs)


def outcome(model: SwinTransformer) -> list[Tensor]:
    """Logits, losses and all gradients of a training step; draws restarted."""
    torch.manual_seed(5)
    for layer in model.moe_layers().values():
        layer.seed_noise(7)
    model.zero_grad()
    out = model(IMAGES)
    (out.logits.square().sum() + out.aux_loss).backward()
    return [out.logits.detach(), out.aux_loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("style", ["v1", "v2"])
def test_dense_blocks_share_a_graph_for_each_stage_and_shift(style: str) -> None:
    model, backend = model_of(style), Counting()
    expected = outcome(model)
    done = compile_blocks(model, backend=backend)
    assert len(done.whole) == 6 and not done.attention_only
    torch.testing.assert_close(outcome(model), expected, rtol=1e-10, atol=1e-12)
    # Stage 0 is shifted in every second block; stage 1's one window covers its map, so that no block is.
    assert backend.graphs == 3
    outcome(model)
    assert backend.graphs == 3


@pytest.mark.parametrize("style", ["v1", "v2"])
def test_attention_on_a_cpu_is_one_operator_of_the_graph(style: str) -> None:
    model, backend = model_of(style), Counting()
    compile_blocks(model, backend=backend)
    outcome(model)
    assert sum("blocked_attention" in name for name in backend.called) == 3  # in each graph
    assert not any("softmax" in name for name in backend.called)
    with torch.no_grad():
        model.eval()(IMAGES)
    assert backend.graphs == 6  # in evaluation nothing is kept


def test_biases_are_added_apart_where_that_rounds_as_before() -> None:
    x, layer = torch.randn(5, 4), torch.nn.Linear(4, 3)
    for context, apart in ((nullcontext(), True), (torch.autocast("cpu", torch.bfloat16), False)):
        backend = Counting()
        compiled = torch.compile(project, backend=backend, fullgraph=True)
        with context:
            y, expected = compiled(layer, x), layer(x)
        assert any("add" in name for name in backend.called) is apart
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        torch._dynamo.reset()


def test_a_hook_on_a_linear_layer_is_called_in_a_graph_too() -> None:
    x, layer = torch.randn(5, 4), torch.nn.Linear(4, 3)
    layer.register_forward_hook(lambda module, given, out: 2 * out)
    compiled = torch.compile(project, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(layer, x), layer(x))


def test_an_exported_program_keeps_its_linear_layers() -> None:
    class Projects(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return project(self.layer, x)

    graph = torch.export.export(Projects(), (torch.randn(5, 4),)).graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == ["aten.linear.default"]


@pytest.mark.parametrize("dispatcher", ["padded", "gshard"])
def test_blocks_with_padded_experts_are_one_graph_too(dispatcher: str) -> None:
    moe = replace(PADDED, dispatcher=dispatcher)
    model, backend = model_of("v2", moe=moe, moe_blocks=((1, 3), (1,))), Counting()
    expected = outcome(model)
    assert len(compile_blocks(model, backend=backend).whole) == 6
    torch.testing.assert_close(outcome(model), expected, rtol=1e-10, atol=1e-12)
    assert backend.graphs == 4  # dense and sparse blocks differ; stage 0's shifted ones are all sparse


def test_recomputed_blocks_are_compiled_inside() -> None:
    model, backend = model_of("v2", grad_checkpointing=True), Counting()
    expected = outcome(model)
    compile_blocks(model, backend=backend)
    torch.testing.assert_close(outcome(model), expected, rtol=1e-10, atol=1e-12)
    assert backend.graphs == 3


def test_of_ragged_experts_the_attention_is_compiled() -> None:
    moe = replace(PADDED, dispatcher="ragged")
    model, backend = model_of("v2", moe=moe, moe_blocks=((1, 3), (1,))), Counting()
    expected = outcome(model)
    done = compile_blocks(model, backend=backend)
    assert list(done.attention_only) == ["layers.0.blocks.1", "layers.0.blocks.3", "layers.1.blocks.1"]
    assert "padded" in done.attention_only["layers.0.blocks.1"]
    torch.testing.assert_close(outcome(model), expected, rtol=1e-10, atol=1e-12)
    assert backend.graphs == 4


@pytest.mark.parametrize("kind", ["bounded", "dropless"])
def test_a_capacity_that_follows_the_data_is_named(kind: Any) -> None:
    capacity = CapacityConfig(train=CapacityPolicy(kind=kind), eval=FIXED)
    model = model_of("v2", moe=replace(PADDED, capacity=capacity), moe_blocks=((1,), ()))
    assert kind in compile_blocks(model, backend="eager").attention_only["layers.0.blocks.1"]


def test_a_moving_average_is_a_copy_that_runs_as_before() -> None:
    model, backend = model_of("v1"), Counting()
    compile_blocks(model, backend=backend)
    twin = copy.deepcopy(model).eval()
    twin(IMAGES)
    assert backend.graphs == 0
    assert list(twin.state_dict()) == list(model.state_dict()) == list(model_of("v1").state_dict())
