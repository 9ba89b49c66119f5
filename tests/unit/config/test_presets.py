"""Named presets: complete, systematic, sourced, and nobody's to change."""

from __future__ import annotations

import re

import pytest

from swinmoe.config import ModelConfig
from swinmoe.config.io import build
from swinmoe.config.presets import PRESET_SOURCES, PRESETS, describe_presets, preset_values
from swinmoe.errors import ConfigError

PUBLISHED = [
    *(f"swin_v1_{size}_224_w7" for size in "tsbl"),
    *("swin_v1_b_384_w12", "swin_v1_l_384_w12"),
    *(f"swin_v2_{size}_256_w8" for size in "tsb"),
    *(f"swin_v2_{size}_256_w16" for size in "tsblhg"),
    *(f"swin_v2_{size}_384_w24" for size in "blhg"),
    *(f"swin_v2_{size}_192_w12" for size in "blhg"),
    *(f"swin_v2_{size}_{variant}" for size in "bl" for variant in ("256_w12to16", "384_w12to24")),
    *(
        f"swin_moe_{size}_192_w12_{kind}"
        for size in "sb"
        for kind in ("dense", "e8", "e16", "e32", "e32_cosine", "e32_k2", "e64", "e128")
    ),
]


def config(name: str) -> ModelConfig:
    return build(ModelConfig, {"preset": name})


def test_every_published_size_has_a_preset():
    assert set(PUBLISHED) <= set(PRESETS)
    others = set(PRESETS) - set(PUBLISHED)
    assert all("mini" in name or "micro" in name for name in others), others


@pytest.mark.parametrize("name", PRESETS)
def test_its_name_tells_what_it_is(name):
    cfg = config(name)
    assert cfg.preset == name
    lineage = name.split("_")[1]
    if "micro" not in name:
        side, window = re.search(r"_(\d+)_(?:p\d+_)?w(?:\d+to)?(\d+)", name).groups()
        assert cfg.img_size == (int(side), int(side))
        assert cfg.window_size == (int(window), int(window))
        assert cfg.style == {"v1": "v1", "v2": "v2", "moe": "swin_moe"}[lineage]
    patch = re.search(r"_p(\d)", name)
    assert cfg.patch_size == ((int(patch[1]),) * 2 if patch else (2, 2) if "micro" in name else (4, 4))
    experts = re.search(r"_e(\d+)", name)
    assert (cfg.moe.num_experts if cfg.moe else None) == (
        int(experts[1]) if experts else 8 if name == "swin_moe_micro" else None
    )
    if cfg.moe:
        assert cfg.moe.top_k == (2 if name.endswith("_k2") else 1)
        assert cfg.moe.router.type == ("cosine" if name.endswith("_cosine") else "linear")


@pytest.mark.parametrize("name", PRESETS)
def test_it_says_where_it_is_from(name):
    assert re.search(r"arXiv \d{4}\.\d{5}|swinmoe's own", PRESET_SOURCES[name])
    assert PRESET_SOURCES[name] in describe_presets()[name]


def test_the_two_largest_have_extra_norms_and_a_small_branch_at_the_start():
    for name in PUBLISHED:
        large = name.startswith(("swin_v2_h", "swin_v2_g"))
        cfg = config(name)
        assert cfg.extra_norm_every == (6 if large else 0)
        assert cfg.res_post_norm_init == (1e-5 if large else 0.0)


def test_fine_tuned_models_measure_offsets_by_their_first_window():
    for name in PUBLISHED:
        assert config(name).pretrained_window_sizes == ((12, 12, 12, 6) if "w12to" in name else None)


def test_head_dimension_is_that_of_the_papers():
    for name in PUBLISHED:
        cfg = config(name)
        assert all(cfg.embed_dim * 2**stage == 32 * heads for stage, heads in enumerate(cfg.num_heads))


def test_our_own_recipes_use_the_balance_loss_that_learns():
    for name in PRESETS:
        moe = config(name).moe
        if moe is not None:
            assert moe.losses.importance_load_tutel == 0
            assert moe.losses.importance_load + moe.losses.gshard == 0.01


def test_mini_models_cover_the_patches_and_windows_of_small_images():
    minis = [config(name) for name in PRESETS if "mini" in name]
    assert {cfg.patch_size for cfg in minis} == {(1, 1), (2, 2), (4, 4)}
    assert {min(cfg.window_size) for cfg in minis} >= {2, 4, 7, 8}
    assert {cfg.style for cfg in minis} == {"v1", "v2", "swin_moe"}


def test_a_preset_is_the_callers_own_copy():
    values = preset_values("swin_moe_s_192_w12_e8")
    values["moe"]["losses"]["importance_load"] = 7.0
    values["embed_dim"] = 1
    assert config("swin_moe_s_192_w12_e8").moe.losses.importance_load == 0.01
    assert config("swin_moe_s_192_w12_e8").embed_dim == 96


def test_a_key_laid_on_top_leaves_the_rest():
    cfg = build(ModelConfig, {"preset": "swin_moe_s_192_w12_e8", "moe": {"router": {"noise": 0.5}}, "num_classes": 3})
    assert (cfg.num_classes, cfg.moe.router.noise, cfg.moe.router.batch_prioritized) == (3, 0.5, True)
    assert cfg.moe.capacity.train.factor == 1.25


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(ConfigError, match="unknown model preset 'swin_v1_t_224_w8'; did you mean 'swin_v1_t_224_w7'"):
        preset_values("swin_v1_t_224_w8")
    with pytest.raises(ConfigError, match=r"unknown model preset 'resnet'; families: .*swin_v1_t_224"):
        preset_values("resnet")
