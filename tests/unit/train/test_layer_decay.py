"""Layer ids against numbers typed in from Microsoft's rule, and the rates that the optimiser is given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from swinmoe.config import OptimConfig
from swinmoe.config.io import build
from swinmoe.errors import ConfigError
from swinmoe.models import create_model
from swinmoe.train.layer_decay import last_layer, layer_id, rate_scale_of
from swinmoe.train.optim import decays, make_optimizer, set_rate

SWIN_B = (2, 2, 18, 2)

# Swin-B has 24 blocks: ids 0 to 25. Typed in from the rule in Microsoft's optimizer.py.
IDS = {
    "mask_token": 0,
    "patch_embed.proj.weight": 0,
    "patch_embed.norm.bias": 0,
    "layers.0.blocks.0.norm1.weight": 1,
    "layers.0.blocks.1.mlp.fc1.weight": 2,
    "layers.0.downsample.reduction.weight": 2,
    "layers.0.downsample.norm.weight": 2,
    "layers.1.blocks.0.attn.qkv.weight": 3,
    "layers.1.downsample.norm.bias": 4,
    "layers.2.blocks.0.attn.cpb_mlp.0.weight": 5,
    "layers.2.blocks.17.mlp.experts.fc1_weight": 22,
    "layers.2.blocks.17.mlp.router.weight": 22,
    "layers.2.downsample.reduction.weight": 22,
    "layers.3.blocks.0.attn.logit_scale": 23,
    "layers.3.blocks.1.norm3.weight": 24,
    "norm.weight": 25,
    "head.weight": 25,
    "absolute_pos_embed": 25,
}


@pytest.mark.parametrize(("name", "number"), IDS.items())
def test_ids_are_the_official_ones(name: str, number: int) -> None:
    assert layer_id(name, SWIN_B) == number


def test_the_smallest_rate_of_swin_b_at_a_decay_of_0_8() -> None:
    assert last_layer(SWIN_B) == 25
    assert rate_scale_of("patch_embed.proj.weight", SWIN_B, 0.8) == pytest.approx(0.003778, abs=5e-7)  # 0.8^25
    assert rate_scale_of("head.bias", SWIN_B, 0.8) == 1.0


def test_every_parameter_is_in_the_group_of_its_layer_and_decay() -> None:
    model = create_model("swin_moe_micro", embed_dim=16, num_heads=[1, 2], num_classes=10)
    depths = model.config.depths
    optimizer = make_optimizer(model, OptimConfig(layer_decay=0.5, weight_decay=0.1))
    set_rate(optimizer, 0.01)
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            seen.append(name)
            assert group["lr"] == pytest.approx(0.01 * 0.5 ** (sum(depths) + 1 - layer_id(name, depths)))
            assert group["weight_decay"] == (0.1 if decays(name, parameter) else 0.0)
    assert sorted(seen) == sorted(names.values())
    assert len({group["rate_scale"] for group in optimizer.param_groups}) == sum(depths) + 2


def test_one_adamw_step_moves_layers_in_the_ratio_of_their_rates() -> None:
    """AdamW's first step is rate·sign(gradient), whatever the gradient's size."""
    model = create_model("swin_moe_micro", embed_dim=16, num_heads=[1, 2], num_classes=10)
    optimizer = make_optimizer(model, OptimConfig(layer_decay=0.5, weight_decay=0.0, eps=1e-20))
    set_rate(optimizer, 0.01)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = float((before[name] - parameter.detach()).mean())
        assert moved == pytest.approx(0.01 * rate_scale_of(name, model.config.depths, 0.5), rel=1e-3)


def test_without_decay_there_are_the_two_groups_of_old() -> None:
    model = create_model("swin_moe_micro", embed_dim=16, num_heads=[1, 2])
    assert [g["weight_decay"] for g in make_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups] == [0.1, 0.0]


def test_what_has_no_known_layers_is_refused_a_decay() -> None:
    make_optimizer(nn.Linear(2, 2), OptimConfig())
    with pytest.raises(ConfigError, match=r"layer_decay=0\.5 needs a Swin Transformer"):
        make_optimizer(nn.Linear(2, 2), OptimConfig(layer_decay=0.5))


@pytest.mark.parametrize("value", [0.0, 1.1, -1.0])
def test_a_decay_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="layer_decay"):
        build(OptimConfig, {"layer_decay": value})
