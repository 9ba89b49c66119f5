"""The same comparison with a Tutel that is installed, and the recording against what it gives now."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from swinmoe import from_tutel
from tests.numerics import tutel_cases as cases
from tests.numerics.tutel_cases import CASES, DIM, HIDDEN, NUM_EXPERTS, Case

moe = pytest.importorskip("tutel.moe", reason="Tutel is not installed; recorded outputs are checked instead")
from tests.numerics import tutel_findings as found  # noqa: E402

DATA = Path(__file__).parents[1] / "data"
SHARED = cases.shared_tensors()
ABOUT = json.loads((DATA / "tutel.json").read_text())
TENSORS = load_file(DATA / "tutel.safetensors")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("dispatcher", ["tutel", "ragged", "padded"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_whole_layer(case, dispatcher):
    theirs = cases.live_layer(case, SHARED)
    ours = from_tutel(theirs, dispatcher=dispatcher)
    seen = cases.observe(theirs, case, SHARED)
    for name, value in seen.items():
        torch.testing.assert_close(value, TENSORS[f"{case.name}/{name}"], atol=1e-6, rtol=1e-5)
    if case.miscounted:
        cases.cut_at(ours, int(seen["slots"]))
    cases.compare(ours, case, SHARED, seen)


def test_the_stand_in_has_what_a_layer_has():
    for case in CASES[:: len(CASES) // 4]:
        real, fake = cases.live_layer(case, SHARED), cases.stand_in(case, SHARED)
        for owner, twin in ((real, fake), (real.gates[0], fake.gates[0])):
            names = [n for n in (*vars(twin), *vars(type(twin))) if not n.startswith("_") and n != "training"]
            assert names
            for name in names:
                assert getattr(owner, name) == getattr(twin, name), name
        assert type(real.gates[0]).__module__ == type(fake.gates[0]).__module__
        assert type(real.experts).__module__ == type(fake.experts).__module__
        assert from_tutel(real).cfg == from_tutel(fake).cfg


def test_the_findings_are_as_recorded():
    assert json.loads(json.dumps(found.findings())) == ABOUT["findings"]
    assert json.loads(json.dumps(found.capacities())) == ABOUT["capacities"]
    for name, value in {
        **{f"load_loss/{k}": v for k, v in found.load_loss().items()},
        "doubles/y": found.doubles(),
    }.items():
        torch.testing.assert_close(value, TENSORS[name], atol=1e-6, rtol=1e-5)


PLAIN = Case("linear", 2, 1.0, bpr=False, normalize=True, gshard=True, noise=0.0)


def both(layer: nn.Module, x: torch.Tensor, **options) -> None:
    """Outputs and token gradients of a layer and of its conversion."""
    ours = from_tutel(layer, **options)
    results = []
    for run in (layer, lambda x: ours(x)[0]):
        x = x.clone().requires_grad_()
        y = run(x)
        results.append((y.detach(), torch.autograd.grad((y * SHARED["direction"]).sum(), x)[0]))
    torch.testing.assert_close(results[0], results[1], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("activation", [F.relu, F.gelu, nn.ReLU(), lambda x: F.gelu(x)])
@pytest.mark.parametrize("has_fc1_bias", [True, False])
@pytest.mark.parametrize("has_fc2_bias", [True, False])
def test_activations_and_biases(activation, has_fc1_bias, has_fc2_bias):
    experts = {"type": "ffn", "num_experts_per_device": NUM_EXPERTS, "hidden_size_per_expert": HIDDEN}
    experts |= {"activation_fn": activation, "has_fc1_bias": has_fc1_bias, "has_fc2_bias": has_fc2_bias}
    layer = moe.moe_layer({"type": "top", "k": 2, "capacity_factor": 1.0}, DIM, experts)
    both(layer, SHARED["x"])


def test_llama_experts():
    experts = {"type": "llama_ffn", "num_experts_per_device": NUM_EXPERTS, "hidden_size_per_expert": HIDDEN}
    layer = moe.moe_layer({"type": "top", "k": 2, "capacity_factor": 0.0}, DIM, experts)
    with torch.no_grad():
        for p in layer.experts.parameters():
            p.mul_(50)
    both(layer, SHARED["x"])
    assert from_tutel(layer).cfg.experts.type == "swiglu"


def test_evaluation_and_frozen_parameters():
    case = replace(PLAIN, noise=1.0, gshard=False)
    layer = cases.live_layer(case, SHARED).eval()
    layer.experts.batched_fc2_bias.requires_grad_(False).zero_()
    layer.gates[0].wg.weight.requires_grad_(False)
    both(layer, SHARED["x"])  # without noise now
    ours = from_tutel(layer)
    assert not ours.training
    assert ours.cfg.experts.fc2_bias == "frozen-zero"
    assert {n for n, p in ours.named_parameters() if not p.requires_grad} == {"experts.fc2_bias", "router.weight"}


def test_training_both_side_by_side():
    """Twenty steps of plain gradient descent from the same weights: still the same layer."""
    theirs = cases.live_layer(PLAIN, SHARED)
    ours = from_tutel(theirs, dispatcher="tutel")
    target = SHARED["direction"]
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.05) for layer in (theirs, ours)]
    losses = []
    for _ in range(20):
        y = theirs(SHARED["x"])
        z, stats = ours(SHARED["x"])
        pair = [(y - target).square().mean() + y.l_aux, (z - target).square().mean() + stats.loss]
        for loss, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append([loss.detach() for loss in pair])
    assert losses[-1][0] < 0.98 * losses[0][0]
    for a, b in losses:
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    trained = from_tutel(theirs)
    for (name, a), b in zip(trained.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
