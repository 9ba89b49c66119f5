"""The recipes under configs/train against tables typed in here from Microsoft's configs and code.

The tables are copied from microsoft/Swin-Transformer (configs/swin, swinv2, swinmoe; config.py; main_moe.py), not from
our presets, and are compared with what our YAML resolves to: presets expanded, rates scaled, parameters grouped.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from swinmoe.config import RunConfig
from swinmoe.config.io import load
from swinmoe.models.build import build_model
from swinmoe.train.optim import decays, make_optimizer
from swinmoe.train.schedule import Length, make_learning_rate

RECIPES = Path(__file__).parents[2] / "configs" / "train"

# file: experts, router, drop path, initial scale
SWIN_MOE = {
    "swin_moe_s_192_w12_dense": (None, None, 0.2, 0.02),
    "swin_moe_s_192_w12_e8": (8, "linear", 0.2, 0.005),
    "swin_moe_s_192_w12_e16": (16, "linear", 0.2, 0.005),
    "swin_moe_s_192_w12_e32": (32, "linear", 0.2, 0.005),
    "swin_moe_s_192_w12_e32_cosine": (32, "cosine", 0.2, 0.005),
    "swin_moe_s_192_w12_e64": (64, "linear", 0.2, 0.005),
    "swin_moe_b_192_w12_dense": (None, None, 0.2, 0.02),
    "swin_moe_b_192_w12_e8": (8, "linear", 0.3, 0.005),
    "swin_moe_b_192_w12_e16": (16, "linear", 0.3, 0.005),
    "swin_moe_b_192_w12_e32": (32, "linear", 0.3, 0.005),
    "swin_moe_b_192_w12_e32_cosine": (32, "cosine", 0.3, 0.005),
}
# width, heads, depths
SHAPES = {
    "t": (96, (3, 6, 12, 24), (2, 2, 6, 2)),
    "s": (96, (3, 6, 12, 24), (2, 2, 18, 2)),
    "b": (128, (4, 8, 16, 32), (2, 2, 18, 2)),
    "l": (192, (6, 12, 24, 48), (2, 2, 18, 2)),
}
# file: image, window, classes, drop path, epochs, warm-up, weight decay, batch, peak, warm-up start, floor
DENSE = {
    "swin_v1_t_224_w7": (224, 7, 1000, 0.2, 300, 20, 0.05, 1024, 1e-3, 1e-6, 1e-5),
    "swin_v1_s_224_w7": (224, 7, 1000, 0.3, 300, 20, 0.05, 1024, 1e-3, 1e-6, 1e-5),
    "swin_v1_b_224_w7": (224, 7, 1000, 0.5, 300, 20, 0.05, 1024, 1e-3, 1e-6, 1e-5),
    "swin_v1_l_224_w7_22k": (224, 7, 21841, 0.2, 90, 5, 0.05, 4096, 1e-3, 1e-6, 1e-5),
    "swin_v2_t_256_w8": (256, 8, 1000, 0.2, 300, 20, 0.05, 1024, 1e-3, 1e-6, 1e-5),
    "swin_v2_s_256_w8": (256, 8, 1000, 0.3, 300, 20, 0.05, 1024, 1e-3, 1e-6, 1e-5),
    "swin_v2_b_256_w8": (256, 8, 1000, 0.5, 300, 20, 0.05, 1024, 1e-3, 1e-6, 1e-5),
    "swin_v2_t_256_w16": (256, 16, 1000, 0.2, 300, 20, 0.05, 1024, 1e-3, 1e-6, 1e-5),
    "swin_v2_s_256_w16": (256, 16, 1000, 0.3, 300, 20, 0.05, 1024, 1e-3, 1e-6, 1e-5),
    "swin_v2_b_256_w16": (256, 16, 1000, 0.5, 300, 20, 0.05, 1024, 1e-3, 1e-6, 1e-5),
    "swin_v2_b_192_w12_22k": (192, 12, 21841, 0.2, 90, 5, 0.1, 4096, 1e-3, 1e-6, 1e-5),
    "swin_v2_l_192_w12_22k": (192, 12, 21841, 0.2, 90, 5, 0.1, 4096, 1e-3, 1e-6, 1e-5),
}


def recipe(name: str) -> RunConfig:
    return load(RunConfig, RECIPES / f"{name}.yaml")


def rates(run: RunConfig) -> tuple[float, float, float]:
    """Peak, start of the warm-up and floor of the rate that the optimiser is given, in a run of 100 steps per epoch."""
    assert run.train.epochs is not None
    steps = round(100 * run.train.epochs)
    rate = make_learning_rate(run.optim, run.schedule, run.train, Length(steps=steps), steps_per_epoch=100)
    assert rate.warmup_steps == 100 * run.schedule.warmup_epochs
    assert rate.prefix
    return rate.at(rate.warmup_steps), rate.at(0), rate.at(steps)


def test_no_recipe_is_missing_or_unchecked():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(SWIN_MOE) | set(DENSE)
    assert len(SWIN_MOE) == 11


@pytest.mark.parametrize("name", SWIN_MOE | DENSE)
def test_what_all_recipes_share(name):
    run = recipe(name)
    assert run.name == name
    assert run.optim.betas == (0.9, 0.999)
    assert run.optim.eps == 1e-8
    assert run.optim.lr_batch == 512
    assert run.train.label_smoothing == 0.1
    assert run.train.precision == "fp16"
    assert run.train.accumulation == 1
    augment, mixup = run.data.augment, run.data.mixup
    assert augment.rand_augment == "rand-m9-mstd0.5-inc1"
    assert (augment.color_jitter, augment.random_erasing, augment.horizontal_flip) == (0.4, 0.25, 0.5)
    assert augment.random_resized_crop == (0.08, 1.0)
    assert (mixup.mixup, mixup.cutmix, mixup.prob, mixup.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert run.data.name == "folder"
    model = run.model
    assert model.patch_size == (4, 4)
    assert model.mlp_ratio == 4.0
    assert model.qkv_bias
    assert model.patch_norm
    assert not model.absolute_pos_embed
    assert model.drop_rate == model.attn_drop_rate == 0.0
    assert (model.embed_dim, model.num_heads, model.depths) == SHAPES[name.split("_")[2]]


@pytest.mark.parametrize("name", DENSE)
def test_swin_v1_and_v2(name):
    image, window, classes, drop_path, epochs, warmup, weight_decay, batch, *expected_rates = DENSE[name]
    run = recipe(name)
    model = run.model
    assert model.style == name.split("_")[1]
    assert model.moe is None
    assert model.img_size == run.data.image_size == (image, image)
    assert model.window_size == (window, window)
    assert model.num_classes == classes
    assert model.drop_path_rate == drop_path
    assert model.init_std == 0.02
    assert model.mlp_fc2_bias
    assert (run.train.epochs, run.schedule.warmup_epochs, run.train.batch_size) == (epochs, warmup, batch)
    assert (run.optim.weight_decay, run.optim.clip_grad_norm) == (weight_decay, 5.0)
    assert rates(run) == pytest.approx(tuple(expected_rates), rel=1e-9)


@pytest.mark.parametrize("name", SWIN_MOE)
def test_swin_moe(name):
    experts, router, drop_path, init_std = SWIN_MOE[name]
    run = recipe(name)
    model = run.model
    assert model.style == "swin_moe"
    assert model.img_size == run.data.image_size == (192, 192)
    assert model.window_size == (12, 12)
    assert model.num_classes == 21841
    assert model.drop_path_rate == drop_path
    assert model.init_std == init_std
    assert not model.mlp_fc2_bias
    assert (run.train.epochs, run.schedule.warmup_epochs, run.train.batch_size) == (90, 10, 4096)
    assert (run.optim.weight_decay, run.optim.clip_grad_norm) == (0.1, 3.0)
    assert rates(run) == pytest.approx((1e-3, 1e-6, 1e-5), rel=1e-9)
    moe = model.moe
    if experts is None:
        assert moe is None
        return
    assert moe is not None
    assert model.moe_blocks == ((), (), (1, 3, 5, 7, 9, 11, 13, 15, 17), (1,))
    assert (moe.num_experts, moe.top_k, moe.router.type) == (experts, 1, router)
    assert moe.router.score == "softmax"
    assert moe.router.noise == 1.0
    assert moe.router.fp32
    assert moe.router.batch_prioritized
    assert not moe.router.normalize_gates
    assert (moe.router.proj_dim, moe.router.init_temperature) == (256, 0.5)
    for policy in (moe.capacity.train, moe.capacity.eval):
        assert (policy.kind, policy.factor) == ("fixed", 1.25)
    losses = moe.losses
    assert losses.importance_load_tutel == 0.01
    others = (losses.gshard, losses.importance, losses.load, losses.importance_load, losses.z)
    assert not any(others)
    assert losses.over_layers == "sum"
    assert losses.batch == "local"
    assert (moe.experts.type, moe.experts.hidden_ratio, moe.experts.dropout) == ("gelu", None, 0.1)
    assert (moe.experts.fc1_bias, moe.experts.fc2_bias) == (True, "frozen-zero")
    assert moe.shared_expert_ratio == 0.0


# Last parts of the names that Microsoft's optimizer.py decays; every other parameter is not.
DECAYED = {
    "common": {"patch_embed.proj.weight", "attn.qkv.weight", "attn.proj.weight", "reduction.weight", "head.weight"},
    "dense": {"mlp.fc1.weight", "mlp.fc2.weight"},
    "linear": {"router.weight", "experts.fc1_weight", "experts.fc2_weight"},
    "cosine": {"experts.fc1_weight", "experts.fc2_weight"},
}
PLAIN = {
    "dense": {"norm", "bias", "cpb_mlp"},
    "linear": {"norm", "bias", "cpb_mlp", "fc1_bias", "fc2_bias"},
    "cosine": {"norm", "bias", "cpb_mlp", "fc1_bias", "fc2_bias", "temperature", "projector", "sim_matrix"},
    "v1": {"norm", "bias", "relative_position_bias_table"},
    "v2": {"norm", "bias", "cpb_mlp", "logit_scale", "q_bias", "v_bias"},
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("swin_v1_t_224_w7", "v1"),
        ("swin_v2_t_256_w8", "v2"),
        ("swin_moe_s_192_w12_dense", "dense"),
        ("swin_moe_s_192_w12_e8", "linear"),
        ("swin_moe_s_192_w12_e32_cosine", "cosine"),
    ],
)
def test_parameter_groups(name, kind):
    run = recipe(name)
    model = build_model(run.model, device="meta")
    decayed = set()
    for parameter_name, parameter in model.named_parameters():
        if decays(parameter_name, parameter):
            decayed.add(parameter_name)
    expected_ends = DECAYED["common"] | DECAYED["dense"] | DECAYED.get(kind, set())
    ends = {end for end in expected_ends if any(n.endswith(end) for n in decayed)}
    assert ends == expected_ends
    assert all(n.endswith(tuple(expected_ends)) for n in decayed), decayed
    plain = {n for n, _ in model.named_parameters()} - decayed
    assert all(any(word in n for word in PLAIN[kind]) for n in plain), plain
    assert all(any(word in n for n in plain) for word in PLAIN[kind])

    decay, rest = make_optimizer(model, run.optim).param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (run.optim.weight_decay, 0.0)
    assert len(decay["params"]) == len(decayed)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert len(rest["params"]) == len(plain) - len(frozen)
    assert len(frozen) == (10 if kind in ("linear", "cosine") else 0)
    assert all(n.endswith("fc2_bias") for n in frozen)
