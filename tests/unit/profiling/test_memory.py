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


@pytest.mark.usefixtures("expert_kernel")
@pytest.mark.parametrize(("native", "hidden"), [(True, 1), (False, 2)])
def test_experts_and_what_travels_to_them_are_told_apart(native: bool, hidden: int) -> None:
    """Of hidden rows the kernel keeps what enters the activation, operators what leaves it too."""
    tokens, dim = 64, 8
    layer = MoEMlp(MoEConfig(num_experts=4), dim=dim, hidden_dim=16)
    layer.experts.native = native
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
    assert found["activations"] >= 3 * x.nbytes + hidden * tokens * 16 * 4, "tokens, their gradient, slope, hidden rows"
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


def test_storages_of_one_memory_count_once() -> None:
    """As gradients have them whose memory is lent: NumPy's array in between makes a second storage."""
    tracker = MemoryTracker({"dense": ()})
    with tracker:
        memory = torch.zeros(100)
        lent = torch.from_numpy(memory.numpy()).view(10, 10)
        assert lent.untyped_storage()._cdata != memory.untyped_storage()._cdata
        assert tracker.live["activations"] == 400
        del memory
        assert tracker.live["activations"] == 400, "the other still holds it"
        del lent
        assert tracker.live["activations"] == 0


def test_a_storage_that_is_resized_holds_what_it_has() -> None:
    """As FSDP2 does with parameters that it has gathered. The peak is with both there: 400 and 2·200 bytes."""
    held = torch.zeros(50)
    counted = []

    def step() -> None:
        gathered = torch.zeros(100)
        storage = gathered.untyped_storage()
        storage.resize_(0)
        counted.append(torch.zeros(75))  # 300 and 200: no new peak
        counted.clear()
        storage.resize_(400)
        counted.append(held + 1)
        counted.clear()

    found = peak_memory(step, nn.Identity(), inputs=[held])
    assert found["peak"] == found["activations"] == 200 + 400 + 200


@pytest.mark.parametrize("layer", ["experts", "dense"])
def test_gradients_count_once_and_with_their_parameters(layer: str) -> None:
    """A step that begins by giving gradients back, as a layer's profile has it: parameters, gradients, and no more."""
    x = torch.randn(4, 8)
    module = MoEMlp(MoEConfig(num_experts=8), dim=8, hidden_dim=64) if layer == "experts" else nn.Linear(8, 512)

    def step() -> None:
        module.zero_grad()
        result = module(x)
        loss = result[0].sum() + result[1].loss if isinstance(result, tuple) else result.sum()
        loss.backward()

    step()
    found = peak_memory(step, module, inputs=[x])
    experts = sum(p.nbytes for p in module.experts.parameters()) if isinstance(module, MoEMlp) else 0
    dense = sum(p.nbytes for p in module.parameters()) - experts
    assert found["experts"] == 2 * experts
    assert found["dense"] == (dense if experts else 2 * dense), "the router's gradient comes after the peak"
    assert found["activations"] + found["dispatch"] < experts + dense, "no gradient among them"


def test_gradients_that_the_optimiser_gives_back_count_with_their_parameters() -> None:
    """As in a training step: there are none before it and none after. Two linear layers without bias, of 64·64 each."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    found = peak_memory(step, model, optimizer=optimizer)
    weight = 4 * 64 * 64
    assert found["dense"] == 4 * weight and found["optimizer"] == 4 * weight + 2 * 4
    assert found["activations"] < 8 * 4 * 64
    assert not optimizer._optimizer_step_pre_hooks, "nobody listens any more"


def test_a_compiled_model_is_watched_as_it_is_written() -> None:
    """A dispatch mode and a graph that must be whole refuse each other."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    x = torch.ones(4, 8)

    def step() -> None:
        model(x).sum().backward()
        model.zero_grad()

    step()
    plain = peak_memory(step, model, inputs=[x])
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model.compile(fullgraph=True, backend=backend)
    step()
    assert peak_memory(step, model, inputs=[x]) == plain
    step()
    assert len(graphs) == 1, "and its graph is taken up again"
