"""What the plan counts, against what torch counts on built models: FLOPs, parameters, tensors kept for backward."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swinmoe.config import ModelConfig, RunConfig
from swinmoe.config.io import build
from swinmoe.models import build_model
from swinmoe.profiling.plan.cost import Cost, backward_of, product
from swinmoe.profiling.plan.dry_run import dry_run
from swinmoe.profiling.plan.hardware import load_hardware
from swinmoe.profiling.plan.predict import Scene, spreads_of
from swinmoe.profiling.plan.work import Setting, expert_layers, parts

TINY = {
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "patch_size": 2,
    "window_size": 4,
    "img_size": 30,  # maps of 15 and 8: the first is padded
    "num_classes": 7,
}
SPARSE = {**TINY, "moe": {"num_experts": 4}, "moe_blocks": [[1], [1]]}
STYLES = ("v1", "v2", "swin_moe")


def tiny(**changes: object) -> RunConfig:
    return build(RunConfig, {"model": {**SPARSE, **changes}, "train": {"batch_size": 16}})


def counted(config: ModelConfig, images: int, *, backward: bool) -> int:
    model = build_model(config)
    model.set_attention_impl("explicit")
    with FlopCounterMode(display=False) as counter:
        output = model(torch.randn(images, 3, *config.img_size))
        if backward:
            output.logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("backward", [False, True])
def test_products_of_a_dense_model_are_torchs_own(style: str, backward: bool) -> None:
    config = build(ModelConfig, {**TINY, "style": style})
    planned = [*parts(config, Setting(3))]
    total = sum(part.forward.flops + backward * part.backward.flops for part in planned)
    assert total == counted(config, 3, backward=backward)


@pytest.mark.parametrize("top_k", [1, 2])
def test_products_of_experts_are_torchs_own(top_k: int) -> None:
    run = tiny(moe={"num_experts": 4, "top_k": top_k})
    spreads = spreads_of(run, Scene(load_hardware("cpu"), 1), 3)
    total = sum(part.forward.flops for part in parts(run.model, Setting(3)))
    total += sum(spread.experts()[0].flops for spread in spreads)
    assert total == counted(run.model, 3, backward=False)


def test_experts_spread_and_cut_compute_what_they_do_together() -> None:
    """Every way of sharing rows over 8 ranks costs as many FLOPs on all of them as on one."""
    whole = spreads_of(tiny(), Scene(load_hardware("cpu"), 1), 16)
    alone = sum(cost.flops for spread in whole for cost in spread.experts())
    for ep, group in ((1, 1), (2, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 8)):
        run = build(RunConfig, {"model": SPARSE, "parallel": {"ep_size": ep, "weight_group": group}})
        spreads = spreads_of(run, Scene(load_hardware("cpu"), 8, imbalance=1.0), 2)
        shared = 8 * sum(cost.flops for spread in spreads for cost in spread.experts())
        assert shared == pytest.approx(alone), (ep, group)


def test_a_product_by_hand() -> None:
    assert product(2, 3, 4, 8) == Cost(flops=48, products=8 * (8 + 12 + 6), calls=1)
    assert backward_of(2, 3, 4, 8) == Cost(flops=96, products=2 * 8 * (8 + 12 + 6), calls=2)


def test_expert_layers_have_the_models_own_parameters() -> None:
    run = tiny(moe={"num_experts": 4, "experts": {"type": "swiglu", "hidden_ratio": 0.5}})
    model = build_model(run.model, device="meta")
    planned = [layer.num_experts * layer.expert_params for layer in expert_layers(run.model)]
    built = [sum(p.numel() for p in layer.experts.parameters()) for layer in model.moe_layers().values()]
    assert planned == built


WAYS = {
    "tokens": {"ep_size": 4},
    "2dh": {"ep_size": 4, "exchange": "2dh", "local_size": 2},
    "chunks": {"ep_size": 2, "chunks": 2},
    "weights": {"ep_size": 4, "weight_group": 4},
    "both": {"ep_size": 4, "weight_group": 2},
    "slices": {"ep_size": 8},
    "slices joined": {"ep_size": 8, "weight_group": 2},
    "replicas only": {"ep_size": 1},
    "zero": {"ep_size": 1, "zero": True},
    "zero beside tokens": {"ep_size": 2, "zero": True},
    "fsdp": {"ep_size": 1, "shard_dense": True},
    "fsdp beside tokens": {"ep_size": 4, "shard_dense": True},
    "fsdp, zero over replicas": {"ep_size": 2, "shard_dense": True, "zero": True},
}
MODELS = {
    "v1": {"style": "v1"},
    "v2, every stage again": {"style": "v2", "grad_checkpointing": True},
    "swin-moe, second stage again": {
        "style": "swin_moe",
        "grad_checkpointing": [1],
        "moe": {
            "num_experts": 4,
            "top_k": 2,
            "router": {"noise": 1.0},
            "losses": {"importance_load": 0.01, "z": 0.1},
            "experts": {"fc2_bias": "frozen-zero"},
        },
    },
    "dropout everywhere": {
        "style": "v2",
        "drop_rate": 0.1,
        "attn_drop_rate": 0.1,
        "moe": {"num_experts": 4, "experts": {"dropout": 0.1}},
    },
    "local balance": {"moe": {"num_experts": 4, "losses": {"gshard": 0.01, "batch": "local"}}},
}


OFTEN = ("tokens", "weights", "zero beside tokens", "fsdp", "fsdp beside tokens")
CASES = [("v1", way) for way in WAYS] + [(model, way) for model in [*MODELS][1:] for way in OFTEN]


@pytest.mark.parametrize(("model", "way"), CASES)
def test_a_step_on_ranks_that_are_not_there_is_as_planned(model: str, way: str) -> None:
    """Parameters, gradients, moments and every message to the byte, by the code that trains; activations nearly."""
    tree = {"model": {**SPARSE, **MODELS[model]}, "parallel": WAYS[way], "train": {"batch_size": 64}}
    found = dry_run(build(RunConfig, tree), load_hardware("cpu"), 8)
    assert [look.rank for look in found.looks] == [0, 7]
    assert found.holds, [(look.rank, check) for look in found.looks for check in look.checks if not check.holds]


def test_a_dense_run_and_its_micro_batches_are_as_planned() -> None:
    tree = {"model": TINY, "train": {"batch_size": 64, "accumulation": 2}}
    found = dry_run(build(RunConfig, tree), load_hardware("cpu"), 16)
    assert found.holds
    messages = {check.what for check in found.looks[0].checks if ":" in check.what}
    assert messages == {"all_reduce: summing dense gradients, bytes"}


@pytest.mark.parametrize("parallel", [{"shard_dense": True}, {"zero": True}, {"zero": True, "shard_dense": True}])
def test_what_ranks_share_is_as_planned_in_micro_batches_too(parallel: dict[str, bool]) -> None:
    tree = {"model": SPARSE, "parallel": {"ep_size": 2, **parallel}, "train": {"batch_size": 64, "accumulation": 2}}
    found = dry_run(build(RunConfig, tree), load_hardware("cpu"), 8)
    assert found.holds, [(look.rank, check) for look in found.looks for check in look.checks if not check.holds]
    assert not any("parallel" in words for words in found.set_aside)


def test_layers_with_capacities_of_their_own_are_as_planned() -> None:
    """Slots that travel and activations differ by layer; nothing is put aside."""
    fixed = {"kind": "fixed", "factor": 1.0}
    layers = {"layers.1.blocks.1.mlp": {"train": {"kind": "fixed", "factor": 3.0}}}
    moe = {"num_experts": 4, "dispatcher": "padded", "capacity": {"train": fixed, "layers": layers}}
    tree = {"model": {**SPARSE, "moe": moe}, "parallel": {"ep_size": 4}, "train": {"batch_size": 64}}
    found = dry_run(build(RunConfig, tree), load_hardware("cpu"), 8)
    assert found.holds, [(look.rank, check) for look in found.looks for check in look.checks if not check.holds]
    assert found.set_aside == ("train.native_kernels=experts",)
    assert dry_run(build(RunConfig, tree), load_hardware("a100"), 8).set_aside == ()


@pytest.mark.parametrize(
    "changes", [{"drop_rate": 0.1}, {"attn_drop_rate": 0.1}, {"moe": {"num_experts": 4, "experts": {"dropout": 0.1}}}]
)
def test_what_dropout_keeps_is_planned(changes: dict[str, object]) -> None:
    """More than without, planned and found: masks, and attention weights after theirs."""

    def kept(changes: dict[str, object]) -> tuple[float, float]:
        run = build(RunConfig, {"model": {**SPARSE, "style": "v2", **changes}, "train": {"batch_size": 64}})
        (check,) = (c for c in dry_run(run, load_hardware("cpu"), 8).looks[0].checks if c.what.startswith("kept"))
        return check.planned, check.found

    planned, found = (more - less for more, less in zip(kept(changes), kept({}), strict=True))
    assert planned == pytest.approx(found, rel=0.05) and found > 0


def test_a_thousand_ranks() -> None:
    tree = {"model": SPARSE, "parallel": {"ep_size": 4}, "train": {"batch_size": 4096}}
    found = dry_run(build(RunConfig, tree), load_hardware("cpu"), 1024)
    last = found.looks[-1]
    assert (last.rank, last.experts, last.neighbours) == (1023, "expert 3", (1020, 1021, 1022, 1023))
    assert last.replicas[:2] == (3, 7) and len(last.replicas) == 256
    assert found.holds


def test_a_plan_that_is_wrong_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    from swinmoe.profiling.plan import dry_run as module

    planned = module.plan_traffic
    monkeypatch.setattr(module, "plan_traffic", lambda *a: {k: v + 1 for k, v in planned(*a).items()})
    run = build(RunConfig, {"model": SPARSE, "parallel": {"ep_size": 2}, "train": {"batch_size": 8}})
    assert not dry_run(run, load_hardware("cpu"), 4).holds
