"""Bytes of a step by class, on cases small enough to add up by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from swinmoe.config import CapacityConfig, CapacityPolicy, MoEConfig
from swinmoe.moe import MoEMlp, phases
from swinmoe.profiling.memory import CLASSES, MemoryTracker, peak_memory


def test_live_bytes_rise_and_fall_with_tensors() -> None:
    held = torch.zeros(10)  # 40 bytes
    tracker = MemoryTracker({"dense": [held, held.view(2, 5)]})
    with tracker, phases.listen(tracker):
        first = held * 2  # 40
        view = first[2:]
        second = torch.cat([first, first])  # 80
        del first
        assert tracker.live["activations"] == 120, "the view keeps its storage"
        del view
        assert tracker.live["activations"] == 80
        del second
        phases.enter("scatter")
        rows = held[:5] + 1  # 20
        phases.enter("experts")
        held.add_(1)
        assert tracker.live == {"dense": 40, "experts": 0, "optimizer": 0, "dispatch": 20, "activations": 0}
        del rows
    assert tracker.live["dispatch"] == 0
    assert tracker.at_peak == {"dense": 40, "experts": 0, "optimizer": 0, "dispatch": 0, "activations": 120}
    assert tracker.peak == 160


def test_a_dense_step_by_hand() -> None:
    """One linear layer without bias, and a square: weight, gradient and two moments of 4·3 floats each, and a scalar
    step count; input and output of 2·4 and 2·3."""
    model = nn.Linear(4, 3, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.ones(2, 4)

    def step() -> None:
        model(x).backward(torch.ones(2, 3))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    step()
    found = peak_memory(step, model, optimizer=optimizer, inputs=[x])
    weight = 4 * 4 * 3
    assert (found["dense"], found["optimizer"], found["experts"]) == (2 * weight, 2 * weight + 4, 0)
    assert found["peak"] == sum(found[name] for name in CLASSES)
    # At least input, output, its gradient and the weight's new gradient are there at once.
    assert found["activations"] >= 4 * (8 + 6 + 6) + weight


def test_experts_and_what_travels_to_them_are_told_apart() -> None:
    tokens, dim = 64, 8
    layer = MoEMlp(MoEConfig(num_experts=4), dim=dim, hidden_dim=16)
    x = torch.randn(tokens, dim, requires_grad=True)
    slope = torch.randn(tokens, dim)

    def step() -> None:
        layer.zero_grad(set_to_none=False)
        y, stats = layer(x)
        torch.autograd.backward([y, stats.loss], [slope, None])

    step()
    found = peak_memory(step, layer, inputs=[x, slope])
    experts = sum(p.nbytes for p in layer.experts.parameters())
    assert found["experts"] == 2 * experts
    assert found["dense"] == 2 * layer.router.weight.nbytes  # type: ignore[union-attr]
    assert found["optimizer"] == 0
    assert found["dispatch"] >= 2 * x.nbytes, "the scattered rows and the gathered tokens"
    assert found["activations"] >= 3 * x.nbytes + 2 * tokens * 16 * 4, (
        "tokens, their gradient, slope, hidden rows twice"
    )
    assert peak_memory(step, layer, inputs=[x, slope]) == found, "to the byte, every time"


def test_what_is_given_back_before_the_peak_does_not_count() -> None:
    def step() -> Tensor:
        small = torch.ones(100)
        del small
        return torch.ones(150).sum()

    assert peak_memory(step, nn.Identity())["peak"] == 4 * 151


@pytest.mark.parametrize(("dispatcher", "most"), [("ragged", 4.05), ("padded", 4.05), ("gshard", 16.0)])
def test_a_layers_memory_grows_with_its_tokens(dispatcher: str, most: float) -> None:
    """Linearly; an einsum over a mask of tokens, experts and capacity grows with their square, which shows that the
    test would see it."""
    capacity = CapacityConfig(train=CapacityPolicy(kind="fixed", factor=1.25))
    layer = MoEMlp(MoEConfig(num_experts=4, top_k=2, dispatcher=dispatcher, capacity=capacity), dim=8, hidden_dim=16)
    peaks = []
    for tokens in (1024, 4096):
        x = torch.randn(tokens, 8)

        def step(x: Tensor = x) -> None:
            y, stats = layer(x)
            torch.autograd.backward([y, stats.loss], [torch.ones_like(y), None])

        step()
        found = peak_memory(step, layer, inputs=[x])
        peaks.append(found["activations"] + found["dispatch"])
    growth = peaks[1] / peaks[0]
    assert 3.5 < growth < most
    assert growth > 8 or dispatcher != "gshard"
