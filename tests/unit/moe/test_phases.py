"""Phases say where the work is, forward and backward, and change not one bit of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from swinmoe.config import ModelConfig, MoEConfig, RouterConfig
from swinmoe.models import build_model
from swinmoe.moe import ExpertWeights, MoEMlp, phases
from swinmoe.moe.phases import BACKWARD, FORWARD, LAYER_PHASES, OTHER

Crossing = tuple[str, str]


class Heard:
    """Keeps what a listener is told."""

    def __init__(self) -> None:
        self.crossings: list[Crossing] = []

    def crossed(self, direction: str, phase: str) -> None:
        self.crossings.append((direction, phase))


@contextmanager
def heard() -> Iterator[list[Crossing]]:
    listener = Heard()
    with phases.listen(listener):
        yield listener.crossings


def step(layer: MoEMlp, x: Tensor) -> tuple[Tensor, ...]:
    """Output, balance loss, and every gradient."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y, stats = layer(x)
    phases.turn(BACKWARD)
    torch.autograd.backward([y.square().sum(), stats.loss])
    return (y, stats.loss, x.grad, *(p.grad for p in layer.parameters()))


class _Spy(torch.autograd.Function):
    """The identity; says where it is, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[tuple[str, str]], name: str) -> Tensor:
        ctx.seen, ctx.name = seen, name
        seen.append((name, phases.current()))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen.append((ctx.name, phases.current()))
        return grad, None, None


def spied(layer: Any) -> list[tuple[str, str]]:
    """Put a spy into each part of `layer`; what they see: (where they are, where the listener was told to be)."""
    seen: list[tuple[str, str]] = []
    scatter, gather = layer.dispatcher.scatter, layer.dispatcher.gather
    function, score = layer.experts.function, layer.router.score_and_pass

    def spy_on(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda first, *rest: call(_Spy.apply(first, seen, name), *rest)

    def spy_on_function(training: bool) -> Callable[..., Tensor]:
        return spy_on("experts", function(training))

    layer.dispatcher.scatter = spy_on("scatter", scatter)
    layer.dispatcher.gather = spy_on("gather", gather)
    layer.router.score_and_pass = spy_on("route", score)
    layer.experts.function = spy_on_function
    return seen


LAYER = [(FORWARD, name) for name in ("route", OTHER, *LAYER_PHASES[1:], OTHER)]
BACK = [(BACKWARD, name) for name in (OTHER, *reversed(LAYER_PHASES), OTHER)]


@pytest.mark.parametrize("dispatcher", ["ragged", "padded", "gshard"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_layer_crosses_every_border_once_each_way(dispatcher: str, top_k: int) -> None:
    layer = MoEMlp(MoEConfig(num_experts=4, top_k=top_k, dispatcher=dispatcher), dim=8, hidden_dim=16)
    with heard() as crossings:
        step(layer, torch.randn(40, 8))
    assert crossings == [(FORWARD, OTHER), *LAYER, *BACK]


@pytest.mark.parametrize("dispatcher", ["ragged", "padded"])
def test_every_part_runs_in_its_phase_both_ways(dispatcher: str) -> None:
    layer = MoEMlp(MoEConfig(num_experts=4, top_k=2, dispatcher=dispatcher), dim=8, hidden_dim=16)
    seen = spied(layer)
    with heard():
        step(layer, torch.randn(40, 8))
    parts = ["route", "scatter", "experts", "gather"]
    assert seen == [(part, part) for part in (*parts, *reversed(parts))]


def test_a_shared_expert_counts_with_the_experts() -> None:
    layer = MoEMlp(MoEConfig(num_experts=4, shared_expert_ratio=0.5), dim=8, hidden_dim=16)
    with heard() as crossings:
        step(layer, torch.randn(40, 8))
    assert crossings[-len(BACK) - 3 :] == [
        (FORWARD, "experts"),
        (FORWARD, OTHER),
        BACK[0],
        (BACKWARD, "experts"),
        *BACK[1:],
    ]


@pytest.mark.parametrize(
    "cfg",
    [
        MoEConfig(num_experts=4, top_k=2),
        MoEConfig(num_experts=4, dispatcher="padded", shared_expert_ratio=0.5),
        MoEConfig(num_experts=4, router=RouterConfig(type="cosine", proj_dim=4, noise=1.0)),
    ],
)
def test_listening_changes_no_bit(cfg: MoEConfig) -> None:
    layer, x = MoEMlp(cfg, dim=8, hidden_dim=16), torch.randn(40, 8)
    layer.seed_noise(3)
    alone = step(layer, x)
    layer.seed_noise(3)
    with heard() as crossings:
        watched = step(layer, x)
    assert crossings and all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))


def test_nobody_listening_means_no_node() -> None:
    layer, x = MoEMlp(MoEConfig(num_experts=4), dim=8, hidden_dim=16), torch.randn(40, 8)
    names: list[str] = []

    def walk(node: Any) -> None:
        if node is not None:
            names.append(node.name())
            for below, _ in node.next_functions:
                walk(below)

    walk(layer(x)[0].grad_fn)
    assert names and not any("Border" in name for name in names)
    with heard():
        walk(layer(x)[0].grad_fn)
    assert any("Border" in name for name in names)


def test_compiled_code_has_no_borders() -> None:
    def f(x: Tensor) -> Tensor:
        phases.enter("experts")
        fn = phases.watched(lambda rows, segments, w: rows * 2)
        return phases.border(fn(x, None, ExpertWeights(x, None, x, None)), "experts", phases.current())

    compiled = torch.compile(f, backend="eager", fullgraph=True)
    x = torch.ones(3, requires_grad=True)
    with heard() as crossings:
        assert torch.equal(compiled(x), 2 * x)
    assert crossings == [(FORWARD, OTHER)]


def test_without_gradients_the_forward_pass_is_told_alone() -> None:
    layer = MoEMlp(MoEConfig(num_experts=4), dim=8, hidden_dim=16)
    with heard() as crossings, torch.no_grad():
        y, _ = layer(torch.randn(40, 8))
    assert crossings == [(FORWARD, OTHER), *LAYER] and y.grad_fn is None


def test_two_listeners_are_one_too_many() -> None:
    with heard(), pytest.raises(AssertionError, match="already"), heard():
        pass
    with heard():
        pass


# ------------------------------------------------------------------------------------------------------- checkpointing


def tiny(checkpointing: bool) -> Any:
    cfg = ModelConfig(
        img_size=(16, 16),
        patch_size=(2, 2),
        in_chans=1,
        embed_dim=8,
        depths=(2,),
        num_heads=(1,),
        window_size=(4, 4),
        num_classes=3,
        moe_blocks=((1,),),
        moe=MoEConfig(num_experts=4),
        drop_path_rate=0.0,
        grad_checkpointing=checkpointing,
    )
    return build_model(cfg, seed=1)


def train(model: Any, images: Tensor) -> list[Tensor]:
    model.zero_grad()
    output = model(images)
    phases.turn(BACKWARD)
    (output.logits.square().sum() + output.aux_loss).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_checkpointing_keeps_parts_in_their_phases_and_all_bits() -> None:
    model, images = tiny(True), torch.randn(2, 1, 16, 16)
    plain = train(model, images)
    (layer,) = model.moe_layers().values()
    seen = spied(layer)
    with heard() as crossings:
        watched = train(model, images)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    parts = ["route", "scatter", "experts", "gather"]
    # Recomputed in the backward pass: everything but the decisions.
    assert seen == [(part, part) for part in (*parts, *parts[1:], *reversed(parts))]
    backward = crossings[crossings.index((BACKWARD, OTHER)) :]
    assert all(direction == BACKWARD for direction, _ in backward)
    assert backward[-1] == (BACKWARD, OTHER)
