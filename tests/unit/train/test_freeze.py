"""What each policy freezes, by name. That frozen tensors stay equal to the bit: integration/test_finetune."""

from __future__ import annotations

import pytest

from swinmoe.config import OptimConfig
from swinmoe.config.finetune import FreezePolicy
from swinmoe.errors import ConfigError
from swinmoe.models import SwinTransformer, create_model
from swinmoe.train.freeze import freeze
from swinmoe.train.optim import make_optimizer


def _model(**over: object) -> SwinTransformer:
    small = {"embed_dim": 16, "num_heads": [1, 2], "num_classes": 10}
    moe = {"num_experts": 4, "shared_expert_ratio": 0.5, "router": {"type": "cosine"}}
    return create_model("swin_moe_micro", **(small | {"moe": moe} | over))


LAYER = "layers.1.blocks.1.mlp"
ROUTER = {f"{LAYER}.router.{part}" for part in ("projector.weight", "projector.bias", "sim_matrix", "temperature")}
EXPERTS = {
    f"{LAYER}.{home}.{part}"
    for home in ("experts", "shared")
    for part in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("none", set()), ("router", ROUTER), ("experts", EXPERTS), ("moe", ROUTER | EXPERTS)],
)
def test_each_policy_freezes_what_it_names(policy: FreezePolicy, expected: set[str]) -> None:
    model = _model()
    assert list(model.moe_layers()) == [LAYER]
    frozen = freeze(model, policy)
    assert set(frozen) == expected
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == expected


def test_backbone_leaves_the_head_alone_to_train() -> None:
    model = _model()
    freeze(model, "backbone")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    assert sum(len(group["params"]) for group in make_optimizer(model, OptimConfig()).param_groups) == 2


def test_what_never_trains_is_told_too() -> None:
    model = _model(moe={"num_experts": 4, "experts": {"fc2_bias": "frozen-zero"}})
    assert freeze(model, "none") == (f"{LAYER}.experts.fc2_bias",)


@pytest.mark.parametrize("policy", ["router", "experts", "moe"])
def test_policies_of_experts_need_experts(policy: FreezePolicy) -> None:
    with pytest.raises(ConfigError, match="the model is dense; use none"):
        freeze(_model(moe=None, moe_blocks=[]), policy)


def test_a_frozen_backbone_needs_a_head() -> None:
    with pytest.raises(ConfigError, match="num_classes=0 means there is none"):
        freeze(_model(num_classes=0), "backbone")
