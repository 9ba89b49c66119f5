"""Closed-form counts against three oracles: the papers' tables, `numel()` of the built model, torch's FLOP counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swinmoe.config import ModelConfig
from swinmoe.config.io import build
from swinmoe.config.presets import PRESETS
from swinmoe.errors import ConfigError
from swinmoe.models.attention import WindowAttention
from swinmoe.models.build import build_model
from swinmoe.models.counts import PartCounts, count
from swinmoe.moe.registry import EXPERTS, ROUTERS

SMALL: dict[str, Any] = {
    "img_size": (16, 16), "patch_size": (2, 2), "in_chans": 3, "num_classes": 5, "embed_dim": 16, "depths": (2, 1),
    "num_heads": (2, 4), "window_size": (4, 4),
}  # fmt: skip
SPARSE: dict[str, Any] = {**SMALL, "moe_blocks": ((1,), (0,))}


def config(preset: str = "custom", **values: Any) -> ModelConfig:
    return build(ModelConfig, {"preset": preset, **values})


def built_flops(cfg: ModelConfig, images: int, *, train: bool = False) -> int:
    """What torch counts on the built model, forward or forward and backward, experts and all."""
    model = build_model(cfg).train(train)
    x = torch.randn(images, cfg.in_chans, *cfg.img_size, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        out = model(x).logits
        if train:
            out.sum().backward()
    return int(counter.get_total_flops())


@pytest.fixture
def explicit_attention(monkeypatch):
    monkeypatch.setattr(WindowAttention, "attention_impl", "explicit")


# preset: parameters (M), multiply-adds (G), as the papers and Microsoft's code print them
PRINTED = {
    "swin_v1_t_224_w7": ("28.29", "4.494"),
    "swin_v1_s_224_w7": ("49.61", "8.747"),
    "swin_v1_b_224_w7": ("87.77", "15.438"),
    "swin_v1_l_224_w7": ("196.53", "34.487"),
    "swin_v1_b_384_w12": ("87.90", "47.105"),
    "swin_v1_l_384_w12": ("196.74", "103.95"),
    "swin_v2_t_256_w8": ("28.35", "5.926"),
    "swin_v2_t_256_w16": ("28.35", "6.605"),
    "swin_v2_s_256_w8": ("49.73", "11.515"),
    "swin_v2_s_256_w16": ("49.73", "12.647"),
    "swin_v2_b_256_w8": ("87.92", "20.286"),
    "swin_v2_b_256_w16": ("87.92", "21.796"),
    "swin_v2_b_384_w24": ("87.92", "54.748"),
    "swin_v2_l_256_w16": ("196.74", "47.491"),
    "swin_v2_l_384_w24": ("196.74", "115.417"),
    "swin_moe_s_192_w12_dense": ("65.8", "6.76"),
    "swin_moe_b_192_w12_dense": ("109.3", "11.78"),
}


def as_printed(value: float, like: str) -> str:
    return f"{value:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("name", PRINTED)
def test_tables_of_the_papers(name):
    counts = count(config(name))
    params, flops = PRINTED[name]
    assert as_printed(counts.total / 1e6, params) == params
    assert as_printed(counts.table_flops / 1e9, flops) == flops


# size, experts: parameters (M) in Tutel's table 11; trainable ones, without the frozen zero biases
SWIN_MOE = {
    "s_192_w12_e8": "173.3",
    "s_192_w12_e16": "296.1",
    "s_192_w12_e32": "541.8",
    "s_192_w12_e64": "1033",
    "s_192_w12_e128": "2016",
    "b_192_w12_e8": "300.3",
    "b_192_w12_e16": "518.7",
    "b_192_w12_e32": "955.3",
}


@pytest.mark.parametrize("name", SWIN_MOE)
def test_swin_moe_parameters(name):
    counts = count(config(f"swin_moe_{name}"))
    assert as_printed(counts.trainable / 1e6, SWIN_MOE[name]) == SWIN_MOE[name]
    # the frozen biases, D per expert: nine layers of width 4C and one of 8C
    experts, width = int(name.rpartition("_e")[2]), {"s": 96, "b": 128}[name[0]]
    assert counts.total - counts.trainable == experts * (9 * 4 + 8) * width


# size, router, capacity factor: multiply-adds (G) in Tutel's tables 11 and 12 and Microsoft's flops()
CAPACITY = [
    ("s", "e32", 1.0, "6.76"),
    ("s", "e32", 1.25, "7.18"),
    ("b", "e32", 1.0, "11.78"),
    ("b", "e32", 1.25, "12.54"),
    ("b", "e32", 0.625, "10.65"),
    ("b", "e32", 0.5, "10.27"),
    ("b", "e32_k2", 1.25, "16.31"),
    ("b", "e32_k2", 1.0, "14.80"),
    ("b", "e32_k2", 0.625, "12.54"),
    ("b", "e32_k2", 0.5, "11.78"),
]


@pytest.mark.parametrize(("size", "experts", "factor", "printed"), CAPACITY)
def test_swin_moe_table_flops_follow_the_capacity_factor(size, experts, factor, printed):
    policy = {"kind": "fixed", "factor": factor}
    counts = count(config(f"swin_moe_{size}_192_w12_{experts}", moe={"capacity": {"eval": policy}}))
    assert as_printed(counts.table_flops / 1e9, printed) == printed


def test_v2_giant_on_the_meta_device():
    cfg = config("swin_v2_g_192_w12")
    model = build_model(cfg, device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == count(cfg).total
    assert f"{count(cfg).total / 1e9:.2f}" == "3.00"
    assert f"{count(cfg).total / 1e6:.1f}" == "3001.9"


def test_v2_huge_is_the_counted_one_plus_its_extra_norms():
    plain = count(config("swin_v2_h_192_w12", extra_norm_every=0))
    assert f"{plain.total / 1e6:.2f}" == "658.03"
    # stage 3 has 18 blocks of width 4·352, so three more norms
    assert count(config("swin_v2_h_192_w12")).total - plain.total == 3 * 2 * 4 * 352


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_as_many_parameters_as_its_built_model(name):
    cfg = config(name)
    counts = count(cfg)
    parameters = list(build_model(cfg, device="meta").parameters())
    assert counts.total == sum(p.numel() for p in parameters)
    assert counts.trainable == sum(p.numel() for p in parameters if p.requires_grad)


DENSE_VARIANTS: dict[str, dict[str, Any]] = {
    "v1": {},
    "v2": {"style": "v2"},
    "swin_moe": {"style": "swin_moe", "mlp_fc2_bias": False},
    "cosine_table_after": {"style": {"similarity": "cosine", "position_bias": "table", "merge_norm": "after"}},
    "padded_map": {"img_size": (18, 18)},
    "odd_map": {"img_size": (18, 26), "style": "v2"},
    "ragged_patches": {"img_size": (17, 30), "patch_size": (2, 4)},
    "rectangular": {"img_size": (12, 36), "window_size": (2, 6), "style": "v2"},
    "shrunk": {"window_size": (7, 7), "style": "v2"},
    "shrunk_per_axis": {"img_size": (8, 32), "window_size": (6, 5)},
    "padded_to_window": {"window_size": (7, 7), "small_map": "pad"},
    "no_biases": {"qkv_bias": False, "mlp_fc2_bias": False},
    "no_biases_cosine": {"qkv_bias": False, "style": "v2"},
    "no_head": {"num_classes": 0},
    "absolute": {"absolute_pos_embed": True, "patch_norm": False, "drop_path_rate": 0.0},
    "extra_norms": {"extra_norm_every": 2, "style": "v2"},
    "fractional_mlp": {"mlp_ratio": 2.6},
    "single_stage": {"depths": (3,), "num_heads": (4,)},
}


@pytest.mark.parametrize("variant", DENSE_VARIANTS)
def test_dense_counts_equal_the_built_model(variant, explicit_attention):
    cfg = config(**SMALL | DENSE_VARIANTS[variant] | {"drop_path_rate": 0.0})
    counts = count(cfg)
    assert counts.total == sum(p.numel() for p in build_model(cfg).parameters())
    assert counts.active == counts.trainable == counts.total
    assert counts.flops == built_flops(cfg, 1)
    assert 3 * (counts.flops - counts.batch_flops) + counts.batch_flops == built_flops(cfg, 3)
    assert counts.step_flops(1) == built_flops(cfg, 1, train=True)
    assert counts.step_flops(3) == built_flops(cfg, 3, train=True)


MOE_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"num_experts": 4},
    "one_expert": {"num_experts": 1},
    "top2": {"num_experts": 4, "top_k": 2},
    "cosine": {"num_experts": 4, "router": {"type": "cosine", "proj_dim": 8}},
    "swiglu": {"num_experts": 4, "top_k": 2, "experts": {"type": "swiglu"}},
    "relu": {"num_experts": 4, "top_k": 2, "experts": {"type": "relu"}},
    "fine_grained": {"num_experts": 8, "top_k": 4, "experts": {"hidden_ratio": 0.25}},
    "odd_hidden": {"num_experts": 4, "experts": {"hidden_ratio": 0.29}, "shared_expert_ratio": 0.12},
    "shared": {"num_experts": 4, "shared_expert_ratio": 0.5},
    "shared_swiglu": {"num_experts": 4, "shared_expert_ratio": 0.5, "experts": {"type": "swiglu", "fc1_bias": False}},
    "no_biases": {"num_experts": 4, "experts": {"fc1_bias": False, "fc2_bias": "none"}},
    "frozen_zero": {"num_experts": 4, "shared_expert_ratio": 1.0, "experts": {"fc2_bias": "frozen-zero"}},
}


@pytest.mark.parametrize("variant", MOE_VARIANTS)
def test_sparse_counts_equal_the_built_model(variant, explicit_attention):
    cfg = config(**SPARSE, moe=MOE_VARIANTS[variant], drop_path_rate=0.0)
    counts = count(cfg)
    parameters = list(build_model(cfg).parameters())
    assert counts.total == sum(p.numel() for p in parameters)
    assert counts.trainable == sum(p.numel() for p in parameters if p.requires_grad)
    assert counts.flops == built_flops(cfg, 1)
    assert counts.step_flops(2) == built_flops(cfg, 2, train=True)


@pytest.mark.parametrize("variant", MOE_VARIANTS)
def test_active_parameters_leave_out_the_experts_that_a_token_does_not_visit(variant):
    cfg = config(**SPARSE, moe=MOE_VARIANTS[variant])
    assert cfg.moe is not None
    # the model with only k experts, less the router's rows for the others
    few = count(config(**SPARSE, moe={**MOE_VARIANTS[variant], "num_experts": cfg.moe.top_k}))
    row = cfg.moe.router.proj_dim if cfg.moe.router.type == "cosine" else None
    others = cfg.moe.num_experts - cfg.moe.top_k
    rows = sum(others * (row or width) for width in (16, 32))
    assert count(cfg).active == few.total + rows


def test_a_sparse_twin_costs_its_router_more_and_nothing_else():
    sparse = count(config("swin_moe_mini_16_p2_w4_e8"))
    dense = count(config("swin_moe_mini_16_p2_w4_e8", moe=None))
    assert sparse.flops - dense.flops == sparse.by_part["router"].flops == 3 * 16 * 2 * 64 * 8
    assert sparse.active - dense.total == sparse.by_part["router"].params
    assert "router" not in dense.by_part
    assert dense.active == dense.total


def test_parts_sum_to_the_whole():
    counts = count(config("swin_moe_s_192_w12_e8"))
    whole = sum(counts.by_part.values(), PartCounts())
    assert (whole.params, whole.active, whole.flops) == (counts.total, counts.active, counts.flops)
    assert whole.table_flops == counts.table_flops
    expected = {"patch_embed", "norms", "attention", "position_bias", "mlp", "router", "experts", "merging", "head"}
    assert set(counts.by_part) == expected


def test_a_batch_pays_its_position_bias_once_per_micro_batch():
    counts = count(config("swin_v2_mini_16_p2_w4"))
    once = counts.step_flops(8)
    assert counts.step_flops(8, micro_batches=4) - once == 3 * counts.batch_train_flops
    assert 0 < counts.batch_train_flops < 3 * counts.batch_flops  # coordinates need no gradient
    assert count(config("swin_v1_mini_16_p2_w4")).batch_flops == 0


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_router_from_outside_counts_as_the_same_one_from_inside(kind, monkeypatch):
    monkeypatch.setitem(ROUTERS._parts, "theirs", ROUTERS.get(kind))
    inside = count(config(**SPARSE, moe={"router": {"type": kind}}))
    assert count(config(**SPARSE, moe={"router": {"type": "theirs"}})) == inside


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("fc2_bias", ["learned", "frozen-zero", "none"])
def test_experts_from_outside_count_as_the_same_ones_from_inside(kind, fc2_bias, monkeypatch):
    monkeypatch.setitem(EXPERTS._parts, "theirs", EXPERTS.get(kind))
    shared: dict[str, Any] = {"top_k": 2, "shared_expert_ratio": 0.5}
    inside = count(config(**SPARSE, moe={**shared, "experts": {"type": kind, "fc2_bias": fc2_bias}}))
    assert count(config(**SPARSE, moe={**shared, "experts": {"type": "theirs", "fc2_bias": fc2_bias}})) == inside


@pytest.mark.parametrize("part", ["router", "experts"])
def test_an_unknown_part_is_named(part):
    with pytest.raises(ConfigError, match=f"moe.{part}.type='theirs' is unknown"):
        count(config(**SPARSE, moe={part: {"type": "theirs"}}))
