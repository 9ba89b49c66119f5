"""Our layer against recorded outputs of a real Tutel (tests/data, made by record_tutel.py): no Tutel is needed.

Where Tutel is wrong or cannot go on, ours is right, and a test of that name says so beside Tutel's recorded value.
Shapes: T tokens, E experts, D width, K choices, C capacity.
"""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from swinmoe import from_tutel
from swinmoe.config import BalanceLossConfig, CapacityPolicy, MoEConfig, RouterConfig
from swinmoe.errors import CheckpointError
from swinmoe.moe import MoEMlp
from swinmoe.moe.capacity import capacity
from tests.numerics.moe_oracle import loop_moe
from tests.numerics.tutel_cases import CASES, NUM_EXPERTS, NUM_TOKENS, Case, compare, cut_at, needed_slots, stand_in

DATA = Path(__file__).parents[1] / "data"
ABOUT = json.loads((DATA / "tutel.json").read_text())
TENSORS = load_file(DATA / "tutel.safetensors")
FINDINGS = ABOUT["findings"]
DISPATCHERS = ["ragged", "padded", "gshard"]


def recorded(prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}/"): v for k, v in TENSORS.items() if k.startswith(f"{prefix}/")}


SHARED = recorded("shared")
PLAIN = Case("linear", 2, 0.0, bpr=False, normalize=False, gshard=True, noise=0.0)


def convert(case: Case, **options: Any) -> MoEMlp:
    return from_tutel(stand_in(case, SHARED), **options)


# ------------------------------------------------------------------------------------------------------------- parity


def test_the_recording_is_of_these_cases():
    assert ABOUT["cases"] == {case.name: case.settings for case in CASES}
    assert len(CASES) == 64
    size = sum(path.stat().st_size for path in DATA.iterdir() if path.name.startswith("tutel."))
    assert size < 500_000


def test_every_pair_of_settings_occurs():
    """Normalisation with one choice means nothing, and the load loss needs noise."""
    values = {f.name: sorted({getattr(c, f.name) for c in CASES}) for f in fields(Case)}
    for a, b in itertools.combinations(values, 2):
        seen = {(getattr(c, a), getattr(c, b)) for c in CASES}
        missing = set(itertools.product(values[a], values[b])) - seen
        assert missing <= {(False, 0.0)} if (a, b) == ("gshard", "noise") else not missing, (a, b, missing)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_whole_layer(case, dispatcher):
    """Choices, places, capacity, gates, outputs, loss and every gradient."""
    theirs = recorded(case.name)
    layer = convert(case, dispatcher=dispatcher)
    if case.miscounted:
        # See the test of that name below. Cut where Tutel cut, everything else agrees here too.
        cut_at(layer, int(theirs["slots"]))
    compare(layer, case, SHARED, theirs)


def test_capacity_formula():
    """C = k·int(factor·ceil(T/E)) with every sign; ours is never 0, which Tutel's layer does not survive."""
    zeros = 0
    for tokens, experts, k, factor, alignment, longest, theirs in ABOUT["capacities"]:
        if alignment != 1:
            continue
        if factor == 0:
            assert theirs == longest
            continue
        ours = capacity(CapacityPolicy(kind="fixed", factor=abs(factor)), tokens, experts, k)
        if factor < 0:
            ours = min(ours, longest)
        zeros += theirs == 0
        assert ours == max(theirs, 1), (tokens, experts, k, factor)
    assert zeros


def test_alignment_only_rounds_tutels_capacity_up():
    """It serves Tutel's slicing and overlap; ours cut rows anywhere, so MoEConfig has no such setting."""
    capacities = {tuple(row[:5]): row[6] for row in ABOUT["capacities"]}
    for (*setting, alignment), slots in capacities.items():
        if alignment == 4 and setting[3] > 0:
            assert slots == -(-capacities[(*setting, 1)] // 4) * 4


# ---------------------------------------------------------------------------------------- where Tutel is wrong, by name


@pytest.mark.parametrize("case", [c for c in CASES if c.miscounted], ids=lambda c: c.name)
def test_tutel_miscounts_the_longest_queue_where_tokens_are_prioritised(case):
    """... so that its "dropless" drops; ours keeps every choice at factor 0, and up to the capacity below 0."""
    theirs = FINDINGS["miscounted_longest_queue"][case.name]
    layer = convert(case)
    noise = SHARED["unit_noise"] * case.noise / NUM_EXPERTS
    y, stats = layer(SHARED["x"], noise)
    assert stats.routed.tolist() == theirs["routed"] != theirs["dispatch_count"]
    if case.gate == "linear":
        want, routed, kept = loop_moe(layer, SHARED["x"], noise)
        assert (stats.routed.tolist(), stats.kept.tolist()) == (routed, kept)
        torch.testing.assert_close(y, want, atol=2e-6, rtol=1e-5)
    if case.factor == 0:
        assert torch.equal(stats.kept, stats.routed)
        assert theirs["slots"] != theirs["longest_queue"] == needed_slots(recorded(case.name)) or case.k > 1


def test_tutels_dropless_did_drop():
    dropless = [FINDINGS["miscounted_longest_queue"][c.name] for c in CASES if c.miscounted and c.factor == 0]
    assert sum(case["choices_dropped"] > 0 for case in dropless) >= len(dropless) // 2


def test_tutels_load_loss_teaches_nothing_where_logits_are_wide():
    """Tutel compares a probability with a logit: at a deviation of 1 only the importance half has a gradient."""
    seen = recorded("load_loss")
    num_experts = seen["x"].shape[1]
    names = ("importance", "load", "importance_load_tutel")

    def gradient(name: str) -> tuple[Tensor, Tensor]:
        cfg = MoEConfig(
            num_experts=num_experts,
            router=RouterConfig(noise=1.0),
            losses=BalanceLossConfig(**{name: 1.0}),
        )
        layer = MoEMlp(cfg, dim=num_experts, hidden_dim=2)
        with torch.no_grad():
            layer.router.weight.copy_(torch.eye(num_experts))
        _, stats = layer(seen["x"], seen["noise"])
        (grad,) = torch.autograd.grad(stats.loss, layer.router.weight)
        return stats.loss.detach(), grad

    ours = {name: gradient(name) for name in names}
    torch.testing.assert_close(ours["importance_load_tutel"][0], seen["l_aux"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours["importance_load_tutel"][1], seen["grad"], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours["importance"][1] / 2, seen["grad"], atol=1e-6, rtol=1e-4)  # nothing of the load
    assert ours["load"][1].norm() > 10 * ours["importance"][1].norm()  # ours, V-MoE's form


def test_tutel_cuts_double_precision_to_single():
    theirs = recorded("doubles")["y"]
    x = SHARED["x"].double()
    ours = convert(PLAIN).double()
    want, _, _ = loop_moe(ours, x)
    scale = want.abs().max()
    assert theirs.dtype == torch.float64
    assert 1e-9 < (theirs - want).abs().max() / scale < 1e-6
    for dispatcher in DISPATCHERS:
        y, _ = convert(PLAIN, dispatcher=dispatcher).double()(x)
        assert (y - want).abs().max() / scale < 1e-14


def test_tutel_fails_without_slots_and_without_tokens():
    errors = FINDINGS["errors"]
    assert errors["no_slots"].startswith("RuntimeError: cannot reshape")
    assert errors["no_tokens"].startswith("ZeroDivisionError")
    case = Case("linear", 1, 0.1, bpr=False, normalize=False, gshard=True, noise=0.0)
    for dispatcher in DISPATCHERS:
        layer = convert(case, dispatcher=dispatcher)
        y, stats = layer(SHARED["x"][:3])  # int(0.1·ceil(3/5)) = 0 slots in Tutel, one here
        assert stats.kept.max() == 1
        y, stats = layer(SHARED["x"][:0])
        (y.sum() + stats.loss).backward()
        assert float(stats.loss.detach()) == 0
        assert all(p.grad is not None for p in layer.parameters())


def test_tutel_layers_cannot_be_copied_after_a_forward():
    assert FINDINGS["errors"]["copy_after_forward"].startswith("RuntimeError")
    layer = convert(PLAIN)
    y, _ = layer(SHARED["x"])
    assert torch.equal(copy.deepcopy(layer)(SHARED["x"])[0], y)


def test_tutel_fills_missing_experts_with_zeros_on_a_strict_load():
    assert FINDINGS["strict_load_without_experts_fills_zeros"] is True
    layer = convert(CASES[0])
    with pytest.raises(RuntimeError, match=r"Missing key.*experts"):
        layer.load_state_dict({k: v for k, v in layer.state_dict().items() if k.startswith("router")}, strict=True)


def test_tutels_default_activation_does_not_run():
    assert FINDINGS["errors"]["default_activation"].startswith("NameError")
    source = stand_in(CASES[0], SHARED)

    def default(x: Tensor) -> Tensor:
        raise NameError("name 'F' is not defined")

    source.experts.activation_fn = default
    with pytest.raises(CheckpointError, match=r"cannot be called \(NameError.*activation='gelu'"):
        from_tutel(source)
    assert from_tutel(source, activation="relu").cfg.experts.type == "relu"


def test_tutel_needs_float32_rows_on_cpus():
    assert FINDINGS["errors"]["half_precision_on_cpu"].startswith("Exception: CPU kernel only supports float32")
    layer = convert(PLAIN)
    y, _ = layer(SHARED["x"])
    half, _ = copy.deepcopy(layer).half()(SHARED["x"].half())
    torch.testing.assert_close(half.float(), y, atol=2e-2, rtol=0)


def test_tutel_takes_the_dicts_it_is_given_apart():
    """A second layer from the same dict fails; our configs are frozen."""
    assert FINDINGS["errors"]["dict_used_twice"] == "KeyError: 'type'"
    cfg = MoEConfig()
    MoEMlp(cfg, dim=4, hidden_dim=4)
    assert cfg == MoEConfig()
    MoEMlp(cfg, dim=4, hidden_dim=4)


def test_capacity_factor_0_per_call_is_obeyed_by_the_recorded_tutel():
    """Tutel before its pull request 303 ignored it; the one recorded does not, so that nothing differs here."""
    assert FINDINGS["tokens_dropped_at_per_call_capacity_factor_0"] == 0
    assert int(convert(PLAIN)(SHARED["x"])[1].kept.sum()) == 2 * NUM_TOKENS
