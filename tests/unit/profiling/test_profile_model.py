"""Profiles of whole models: phases of attention and MLPs both ways, the twin, rows and FLOPs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from micro import MICRO
from torch.utils.flop_counter import FlopCounterMode

from swinmoe.config import RunConfig
from swinmoe.config.io import build, merge
from swinmoe.errors import ConfigError
from swinmoe.models import build_model
from swinmoe.models.counts import count, expert_row_flops
from swinmoe.moe import phases
from swinmoe.parallel import Mesh, make_mesh
from swinmoe.profiling.flops import Rows
from swinmoe.profiling.model import marks, profile_model, random_batches, still, without_experts
from swinmoe.profiling.model_flops import count_rows, model_flops, recomputed_flops, summed
from swinmoe.profiling.model_variant import variant_of
from swinmoe.runtime import make_accelerator
from swinmoe.train import Length, make_arm

SMALL: dict[str, Any] = {
    "model": {**MICRO, "moe": {"num_experts": 4, "top_k": 1}},
    "data": {"name": "digits"},
    "train": {"batch_size": 6, "steps": 1},
}


def small(**changes: Any) -> RunConfig:
    return build(RunConfig, merge(SMALL, changes))


class _Crossings:
    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def crossed(self, direction: str, phase: str) -> None:
        self.heard.append((direction, phase))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_marks_tell_attention_and_mlps_apart_and_change_no_bit(checkpointing: bool) -> None:
    run = small(model={"grad_checkpointing": checkpointing, "drop_path_rate": 0.0})
    model = build_model(run.model)
    images = torch.randn(2, run.model.in_chans, *run.model.img_size)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        output = model(images)
        phases.turn(phases.BACKWARD)
        (output.logits.square().sum() + output.aux_loss).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, listener = step(), _Crossings()
    with marks(model), phases.listen(listener):
        watched = step()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    blocks, layers = sum(run.model.depths), len(model.moe_layers())
    forward = [phase for direction, phase in listener.heard if direction == "forward"]
    backward = [phase for direction, phase in listener.heard if direction == "backward"]
    assert (forward.count("attention"), forward.count("mlp"), forward.count("experts")) == (
        blocks,
        blocks - layers,
        layers,
    )
    assert backward.count("attention") >= blocks and backward.count("experts") >= layers
    assert backward[-1] == "other"
    listener.heard.clear()
    with phases.listen(listener):
        step()
    assert "attention" not in {phase for _, phase in listener.heard}, "marks are gone"


def test_a_training_profile(tmp_path: Any) -> None:
    run = small(model={"moe": {"capacity": {"train": {"kind": "fixed", "factor": 1.0}}}})
    dense, sparse = profile_model({"small": run}, rounds=2, trace=tmp_path / "trace.json")
    assert (dense["name"], sparse["name"], sparse["baseline"]) == ("small: dense twin", "small", "small: dense twin")
    assert (dense["rows"], dense["baseline"], dense["memory"]["experts"]) == (None, None, 0)
    assert set(sparse["phases"]) == {"forward", "backward", "update"}
    assert sparse["phases"]["update"]["optimizer"] > 0 and sparse["phases"]["forward"]["attention"] > 0
    assert dense["phases"]["backward"]["experts"] == 0 < dense["phases"]["backward"]["mlp"]
    assert sparse["ms"]["images_per_second"] == pytest.approx(6000 / sparse["ms"]["median"])
    assert sparse["memory"]["optimizer"] > sparse["memory"]["experts"] > 0
    assert sparse["flops"]["model"] <= sparse["flops"]["dense_equivalent"] == count(run.model).step_flops(6)
    assert (tmp_path / "trace.json").stat().st_size > 0
    exchanges = ("exposed_ms", "hidden_ms", "exchange_ms", "exchange_bytes", "bandwidth")
    assert all(line[key] is None for line in (dense, sparse) for key in exchanges), "one process sends nothing"


def test_an_inference_profile() -> None:
    dense, sparse = profile_model({"small": small()}, rounds=2, backward=False)
    assert set(sparse["phases"]) == {"forward"} and sparse["memory"]["optimizer"] == 0
    assert (
        dense["flops"]["model"]
        == 6 * count(without_experts(small()).model).flops - 5 * count(without_experts(small()).model).batch_flops
    )
    assert sparse["balanced_ms"] > 0


def test_a_dense_run_has_no_twin() -> None:
    run = small(schedule={"warmup_epochs": 20})  # longer than what is profiled, as most runs' are
    (line,) = profile_model({"dense": without_experts(run)}, rounds=2)
    assert line["variant"]["dispatcher"] == "dense" and line["exposed_ms"] is None


def counted_forward(run: RunConfig) -> tuple[dict[str, Rows], dict[str, int], int]:
    """Rows by layer and FLOPs of a forward pass, and the FLOPs that torch's counter sees in it."""
    model = build_model(run.model).eval()
    model.set_attention_impl("explicit")
    images = torch.randn(6, run.model.in_chans, *run.model.img_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model(images)
    rows = count_rows(model.moe_layers(), output.routing, make_mesh(run.parallel), training=False)
    flops = model_flops(count(run.model), rows, run, backward=False)
    return rows, flops, counter.get_total_flops()


@pytest.mark.parametrize("dispatcher", ["ragged", "padded"])
@pytest.mark.parametrize("kind", ["dropless", "fixed"])
def test_hardware_flops_are_what_the_counter_sees(dispatcher: str, kind: str) -> None:
    run = small(model={"moe": {"dispatcher": dispatcher, "capacity": {"eval": {"kind": kind, "factor": 1.25}}}})
    rows, flops, counted = counted_forward(run)
    assert flops["hardware"] == counted
    assert (summed(rows).computed > summed(rows).kept) == (dispatcher == "padded")


@pytest.mark.parametrize("dispatcher", ["ragged", "padded"])
@pytest.mark.parametrize("experts", [{"type": "gelu"}, {"type": "swiglu", "hidden_ratio": 0.5}])
def test_rows_cost_what_their_layer_is_wide(dispatcher: str, experts: dict[str, Any]) -> None:
    """A narrow layer that drops most of its choices, a wide one that drops none, and shared experts that neither drop
    nor pad: what torch's counter sees."""
    moe = {
        "dispatcher": dispatcher,
        "experts": experts,
        "shared_expert_ratio": 0.5,
        "capacity": {
            "eval": {"kind": "fixed", "factor": 0.3},
            "layers": {"layers.1.blocks.0.mlp": {"eval": {"kind": "dropless"}}},
        },
    }
    run = small(model={"depths": [2, 2], "moe_blocks": [[1], [0]], "moe": moe})
    rows, flops, counted = counted_forward(run)
    assert flops["hardware"] == counted
    narrow, wide = rows.values()
    assert narrow.dropped > 0.5 and wide.dropped == 0
    # Of a token of the narrow layer, whose experts have matrices of 16·F; SwiGLU has three of them, half as wide.
    row = 2 * 2 * 16 * 64 if experts["type"] == "gelu" else 2 * 3 * 16 * 32
    assert flops["dense_equivalent"] - flops["model"] == row * (narrow.routed - narrow.kept)


def test_recomputation_costs_hardware_and_not_the_model() -> None:
    plain = small()
    rows = dict.fromkeys(expert_row_flops(plain.model), Rows(10, 10, 10))
    again = small(model={"grad_checkpointing": True})
    found = [model_flops(count(run.model), rows, run, backward=True) for run in (plain, again)]
    assert found[0]["model"] == found[1]["model"] and found[0]["hardware"] < found[1]["hardware"]


@pytest.mark.parametrize(
    "changes", [{"grad_checkpointing": True}, {"grad_checkpointing": [0]}, {"attention_chunks": 2}]
)
def test_recomputed_flops_are_what_the_counter_sees_twice(changes: dict[str, Any]) -> None:
    """Res-post-norm: every product's result is normed, so recomputation spares none."""
    style = {"style": "v2", "window_size": 4, "img_size": 16, "patch_size": 2, "attn_drop_rate": 0.0}

    def total(run: RunConfig) -> int:
        model = build_model(run.model)
        model.set_attention_impl("explicit")
        images = torch.randn(2, run.model.in_chans, *run.model.img_size)
        with FlopCounterMode(display=False) as counter:
            output = model(images)
            (output.logits.sum() + output.aux_loss).backward()
        flops: int = counter.get_total_flops()
        return flops

    plain, again = small(model=style), small(model=style | changes)
    bias = count(plain.model).by_part["position_bias"].flops
    found = total(again) - total(plain) - 2 * recomputed_flops(again.model)
    assert recomputed_flops(plain.model) == 0 < recomputed_flops(again.model)
    assert 0 <= found <= bias, "but for the position-bias networks, which are a batch's"


def loads(run: RunConfig, steps: int) -> list[list[int]]:
    """Choices of each expert before and after so many training steps."""
    mesh = make_mesh(run.parallel, 4)
    arm = make_arm("a", run, mesh, make_accelerator("fp32"), Length(steps=10**9), 10**9)
    batches = random_batches(run, mesh)
    found = []
    for _ in range(2):
        with torch.no_grad():
            routing = arm.raw.eval()(batches[0].images).routing
        found.append(torch.cat([stats.routed for stats in routing.values()]).tolist())
        for _ in range(steps):
            arm.train_step(batches)
    for layer in arm.raw.moe_layers().values():
        assert isinstance(layer.router.expert_bias, torch.Tensor) and layer.router.expert_bias.any(), "it is stepped"
    return found


def test_loads_stay_while_biases_balance_them() -> None:
    run = small(model={"moe": {"router": {"bias_update_rate": 0.1}}})
    before, after = loads(still(run), 3)
    assert before == after
    before, after = loads(run, 3)
    assert before != after, "else this test would see nothing"


def test_a_variant_has_what_a_sweep_varies() -> None:
    """Under the names that a variant always has, else under its own; a twin has nothing of experts."""
    varied = {
        "model.grad_checkpointing": [0, 1],
        "train.compile": True,
        "model.moe.num_experts": 4,
        "model.moe.capacity.train.factor": 2.0,
        "model.moe.router.noise": 1.0,
        "train.ema_decay": None,
    }
    mesh = make_mesh(small().parallel, 4)
    found = variant_of(small(), mesh, True, varied)
    added = {key: value for key, value in found.items() if key not in variant_of(small(), mesh, True, {})}
    assert added == {
        "model.grad_checkpointing": "[0, 1]",
        "train.compile": True,
        "model.moe.router.noise": 1.0,
        "train.ema_decay": "null",
    }
    twin = variant_of(without_experts(small()), mesh, True, varied)
    assert {key for key in twin if "." in key} == {"model.grad_checkpointing", "train.compile", "train.ema_decay"}


def test_a_sweeps_variants_are_told_apart() -> None:
    runs = {f"{on}": small(model={"grad_checkpointing": on}) for on in (False, True)}
    varied = {name: {"model.grad_checkpointing": run.model.grad_checkpointing} for name, run in runs.items()}
    lines = list(profile_model(runs, rounds=1, backward=False, varied=varied))
    assert [line["variant"]["model.grad_checkpointing"] for line in lines] == [False, False, True, True]


def test_runs_that_cannot_be_are_named_and_left_out() -> None:
    """What shows when a model is to be spread; of one run alone, or of all, it is an error."""
    nowhere = small(parallel={"ep_size": 2})
    told: list[str] = []
    lines = list(profile_model({"two": nowhere, "one": small()}, rounds=1, backward=False, say=told.append))
    assert [line["name"] for line in lines] == ["one: dense twin", "one"]
    (said,) = (text for text in told if text.startswith("left out"))
    assert said.startswith("left out: two: parallel.ep_size=2 does not divide the number of processes 1")
    for runs in ({"two": nowhere}, {"two": nowhere, "again": nowhere}):
        with pytest.raises(ConfigError, match="does not divide the number of processes 1"):
            list(profile_model(runs, rounds=1))


def test_every_rank_has_its_share_of_the_batch() -> None:
    sizes = [[len(b) for b in random_batches(small(), Mesh(rank=rank, world=4))] for rank in range(4)]
    assert sizes == [[1], [2], [1], [2]]
    with pytest.raises(ConfigError, match="gives some of the 4 processes no image; use at least 12"):
        random_batches(small(train={"accumulation": 3}), Mesh(rank=0, world=4))
