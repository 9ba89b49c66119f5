"""Models and expert layers that cannot be are refused, with what was given and what would do."""

from __future__ import annotations

import pytest

from swinmoe.config import STYLES, MoEConfig, StyleConfig, resolve_style
from swinmoe.config import ModelConfig as Model
from swinmoe.config.io import build
from swinmoe.errors import ConfigError, SwinMoEError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"style": "v3"}, "unknown style 'v3'; use one of"),
        ({"depths": []}, "at least one stage"),
        ({"depths": [2, -1], "num_heads": [1, 1]}, "0 or more blocks"),
        ({"num_heads": [3, 6]}, "num_heads=.* names 2 stages, depths 4"),
        (
            {"num_heads": [5, 6, 12, 24]},
            r"num_heads\[0\]=5 does not divide the stage's width 96; use a divisor such as 3",
        ),
        ({"img_size": 2}, "smaller than one patch"),
        ({"window_size": 0}, "must be at least 1; give height and width"),
        ({"pretrained_window_sizes": [12]}, "one window for each of the 4 stages"),
        ({"moe": {}}, "moe_blocks places no expert layer"),
        ({"moe": {}, "moe_blocks": [[0]]}, "names 1 stages, depths 4"),
        (
            {"moe": {}, "moe_blocks": [[2], [], [], []]},
            r"moe_blocks\[0\] names block 2, but that stage has blocks 0 to 1",
        ),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1.0 must be in \[0, 1\)"),
    ],
)
def test_impossible_models(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Model, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 0}, "for a dense model use moe: null"),
        ({"num_experts": 4, "top_k": 5}, "top_k=5 is not possible with moe.num_experts=4; use 1 to 4"),
        ({"top_k": 0}, "top_k=0"),
        ({"router": {"noise": -1}}, r"moe\.router\.noise=-1.0 must be at least 0; use 0 for none or 1.0"),
        ({"router": {"bias_update_rate": -1}}, "bias_update_rate=-1.0 must be at least 0"),
        ({"losses": {"load": 0.1}}, "estimates load through the gate noise"),
        ({"losses": {"importance_load": 0.1}}, "estimates load through the gate noise"),
        ({"losses": {"z": -0.1}}, "losses.z=-0.1 must be at least 0"),
        ({"capacity": {"train": {"kind": "fixed", "factor": 0}}}, "must be positive for kind='fixed'"),
        ({"capacity": {"eval": {"min_slots": -1}}}, "min_slots=-1 must be at least 0"),
        ({"experts": {"dropout": 1.0}}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"experts": {"hidden_ratio": 0}}, "hidden_ratio=0.0 must be above 0; use null for 1"),
        ({"shared_expert_ratio": -1}, "shared_expert_ratio=-1.0 must be at least 0"),
    ],
)
def test_impossible_expert_layers(values, message):
    with pytest.raises(ConfigError, match=message):
        build(MoEConfig, values)


def test_noise_makes_the_load_loss_possible():
    assert build(MoEConfig, {"losses": {"load": 0.1}, "router": {"noise": 1.0}}).losses.needs_noise
    assert not MoEConfig().losses.needs_noise


def test_dense_twins_may_keep_the_places_of_experts():
    assert build(Model, {"moe": None, "moe_blocks": [[], [], [1, 3], [1]]}).moe is None


def test_styles_are_three_points_of_four_axes():
    assert STYLES["v1"] == StyleConfig(norm="pre", similarity="dot", position_bias="table", merge_norm="before")
    assert STYLES["v2"] == StyleConfig(
        norm="res-post", similarity="cosine", position_bias="log-cpb-sigmoid", merge_norm="after"
    )
    assert STYLES["swin_moe"] == StyleConfig(norm="pre", similarity="dot", position_bias="log-cpb", merge_norm="before")
    mixed = StyleConfig(norm="res-post")
    assert resolve_style(mixed) is mixed
    assert resolve_style("v2") is STYLES["v2"]
    assert build(Model, {"style": {"norm": "res-post"}}).style == mixed


def test_config_errors_are_value_errors_for_users():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, SwinMoEError)
