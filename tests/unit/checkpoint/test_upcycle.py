"""What upcycling loads, what it reports, and what it refuses by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from swinmoe.checkpoint.upcycle import Upcycling, upcycle
from swinmoe.checkpoint.upcycle_plan import ExpertPlan, nominal_gate_sum, plan_experts
from swinmoe.config import ExpertConfig, ModelConfig, MoEConfig, RouterConfig
from swinmoe.errors import CheckpointError, ConfigError
from swinmoe.models import SwinTransformer, build_model
from swinmoe.moe.registry import ROUTERS, register_router
from swinmoe.moe.routers import LinearRouter


def config(moe: MoEConfig | None = None, **overrides) -> ModelConfig:
    sizes = {"img_size": (8, 8), "patch_size": (2, 2), "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
    return ModelConfig(
        **{**sizes, "window_size": (4, 4), "num_classes": 3, "moe": moe, "moe_blocks": ((1,),)} | overrides
    )


def pair(moe: MoEConfig, **overrides) -> tuple[SwinTransformer, SwinTransformer]:
    return build_model(config(**overrides), seed=1), build_model(config(moe, **overrides), seed=2)


def test_every_tensor_is_reported():
    dense, sparse = pair(MoEConfig(num_experts=2, shared_expert_ratio=0.5))
    report = upcycle(dense.state_dict(), sparse)
    assert set(report.loaded) | set(report.reinitialised) >= {
        "layers.0.blocks.1.mlp.experts.1.fc2.bias",
        "layers.0.blocks.1.mlp.shared.0.fc1.weight",
        "layers.0.blocks.0.mlp.fc1.weight",
        "head.weight",
    }
    assert set(report.reinitialised) == {"layers.0.blocks.1.mlp.router.weight"}
    assert not report.unused and not report.missing
    for name, tensor in dense.state_dict().items():
        if ".blocks.1.mlp." not in name:
            assert torch.equal(sparse.state_dict()[name], tensor), name


def test_what_does_not_fit_is_refused_and_nothing_is_changed():
    dense, sparse = pair(MoEConfig(num_experts=2))
    before = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    state = dense.state_dict()
    without = {name: tensor for name, tensor in state.items() if name != "norm.weight"}
    for given, message in (
        (without, r"lacks norm\.weight"),
        ({**state, "extra": torch.zeros(1)}, r"no place for, extra"),
        ({**state, "head.weight": torch.zeros(9, 16)}, r"'head\.weight' is \(9, 16\) and the model needs \(3, 16\)"),
        ({k: v for k, v in state.items() if k != "layers.0.blocks.1.mlp.fc1.weight"}, "from which experts of"),
        (sparse.state_dict(), "is sparse already"),
    ):
        with pytest.raises(CheckpointError, match=message):
            upcycle(given, sparse)
    for name, tensor in sparse.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with pytest.raises(ConfigError, match="this one is dense"):
        upcycle(dense, dense)
    with pytest.raises(ConfigError, match="of 16 and 64; use the same embed_dim and mlp_ratio"):
        upcycle(dense, build_model(config(MoEConfig(num_experts=2), mlp_ratio=2.0)))


def test_what_is_allowed_by_name_keeps_its_initial_values():
    dense, sparse = pair(MoEConfig(num_experts=2))
    head = sparse.head.weight.clone()
    report = upcycle({**dense.state_dict(), "head.weight": torch.zeros(9, 16)}, sparse, allow=("head.*",))
    assert "head.weight" in report.reinitialised and "head.bias" in report.loaded
    assert torch.equal(sparse.head.weight, head)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (MoEConfig(num_experts=4, experts=ExpertConfig(hidden_ratio=0.3)), "no equal parts of an MLP of 64"),
        (MoEConfig(num_experts=4, experts=ExpertConfig(hidden_ratio=2.0)), "no equal parts of an MLP of 64"),
        (
            MoEConfig(num_experts=4, top_k=1, experts=ExpertConfig(hidden_ratio=0.5)),
            "not both multiples of 2; use e.g. num_experts=4, top_k=2, or preserve=False",
        ),
        (
            MoEConfig(num_experts=6, top_k=4, experts=ExpertConfig(hidden_ratio=0.25)),
            "not both multiples of 4; use e.g. num_experts=8, top_k=4",
        ),
        (MoEConfig(num_experts=4, shared_expert_ratio=1.5), "shared_expert_ratio may be at most 1"),
        (
            MoEConfig(num_experts=4, router=RouterConfig(type="cosine", proj_dim=1)),
            "a cosine router needs router.proj_dim of 2 or more",
        ),
        (
            MoEConfig(
                num_experts=4,
                top_k=2,
                experts=ExpertConfig(hidden_ratio=0.5),
                router=RouterConfig(bias_update_rate=0.01),
            ),
            "bias_update_rate=0.01 ranks experts by their gates",
        ),
        (MoEConfig(num_experts=4, experts=ExpertConfig(type="swiglu")), "type='swiglu' has another first matrix"),
    ],
)
def test_layers_that_cannot_compute_the_mlp_are_refused(moe, message):
    dense, sparse = pair(moe)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        upcycle(dense, sparse)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (ExpertConfig(fc2_bias="none"), "set moe.experts.fc2_bias='learned'"),
        (ExpertConfig(fc2_bias="frozen-zero"), "set moe.experts.fc2_bias='learned'"),
        (ExpertConfig(fc1_bias=False), "set moe.experts.fc1_bias=true"),
    ],
)
def test_biases_without_a_place_are_refused_unless_they_are_zero(experts, message):
    dense, sparse = pair(MoEConfig(num_experts=2, experts=experts))
    upcycle(dense, sparse)  # freshly built: all biases are 0
    with torch.no_grad():
        dense.layers[0].blocks[1].mlp.fc1.bias.fill_(0.1)
        dense.layers[0].blocks[1].mlp.fc2.bias.fill_(0.1)
    with pytest.raises(ConfigError, match=message):
        upcycle(dense, sparse)


def test_without_preserving_anything_goes_and_routers_keep_their_values():
    moe = MoEConfig(num_experts=6, top_k=1, experts=ExpertConfig(hidden_ratio=0.25))
    dense, sparse = pair(moe)
    router = sparse.layers[0].blocks[1].mlp.router.weight
    how = Upcycling(preserve=False)
    assert plan_experts(moe, 64, preserve=False) == ExpertPlan(parts=4, gate_sum=1 / 6, undecided=False)
    before = router.clone()
    upcycle(dense, sparse, how)
    assert torch.equal(router[0], before[0]) and torch.equal(router[3], before[0]) and torch.equal(router[5], before[4])


def test_a_router_from_outside_needs_normalised_gates():
    @register_router("upcycling-test")
    class Own(LinearRouter):
        pass

    try:
        dense, sparse = pair(MoEConfig(num_experts=4, top_k=1, router=RouterConfig(type="upcycling-test")))
        with pytest.raises(ConfigError, match="is not known to upcycling"):
            upcycle(dense, sparse)
        router = RouterConfig(type="upcycling-test", normalize_gates=True)
        dense, sparse = pair(MoEConfig(num_experts=4, top_k=2, router=router))
        upcycle(dense, sparse)
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(sparse.eval()(x).logits, dense.eval()(x).logits)
    finally:
        del ROUTERS._parts["upcycling-test"]


def test_draws_depend_on_seed_layer_and_expert_only():
    dense, sparse = pair(MoEConfig(num_experts=2))
    _, larger = pair(MoEConfig(num_experts=4))
    how = Upcycling(noise=0.1, drop=0.25, preserve=False)
    upcycle(dense, sparse, how)
    upcycle(dense, larger, how)
    few, many = (m.layers[0].blocks[1].mlp.experts for m in (sparse, larger))
    assert torch.equal(few.fc1_weight, many.fc1_weight[:2])
    assert not torch.equal(few.fc1_weight[0], few.fc1_weight[1])
    again = build_model(sparse.config, seed=2)
    upcycle(dense, again, replace(how, seed=1))
    assert not torch.equal(again.layers[0].blocks[1].mlp.experts.fc1_weight, few.fc1_weight)


def test_drop_draws_the_share_with_the_parents_statistics():
    dense, sparse = pair(MoEConfig(num_experts=2), embed_dim=64)
    upcycle(dense, sparse, Upcycling(drop=0.5))
    parent, own = dense.layers[0].blocks[1].mlp, sparse.layers[0].blocks[1].mlp.experts
    for expert in range(2):
        drawn = (own.fc1_weight[expert] != parent.fc1.weight).any(1)
        assert drawn.sum() == 128 == len(drawn) // 2
        assert torch.equal((own.fc2_weight[expert] != 2 * parent.fc2.weight).any(0), drawn)
        fresh = own.fc1_weight[expert][drawn]
        assert fresh.std().item() == pytest.approx(parent.fc1.weight.std().item(), rel=0.05)


@pytest.mark.parametrize(
    ("router", "top_k", "expected"),
    [
        (RouterConfig(), 1, (0.25, True)),
        (RouterConfig(normalize_gates=True), 1, (0.25, True)),
        (RouterConfig(normalize_gates=True), 2, (1.0, False)),
        (RouterConfig(), 4, (1.0, False)),
        (RouterConfig(score="sigmoid"), 4, (2.0, True)),
        (RouterConfig(score="sigmoid", normalize_gates=True), 3, (1.0, False)),
    ],
)
def test_what_gates_add_up_to(router, top_k, expected):
    assert nominal_gate_sum(MoEConfig(num_experts=4, top_k=top_k, router=router)) == expected


def test_numbers_out_of_range():
    with pytest.raises(ConfigError, match=r"upcycling\.drop=1\.0"):
        Upcycling(drop=1.0)
    with pytest.raises(ConfigError, match=r"upcycling\.noise=-1"):
        Upcycling(noise=-1)
