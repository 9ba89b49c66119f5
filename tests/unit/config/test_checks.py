"""Every number that means nothing is refused when the config is made, and what is just possible passes."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from swinmoe.config import AdaptConfig, CompareConfig, OptimConfig, RunConfig
from swinmoe.config.checks import Range, above, at_least, at_most, below_one, probability
from swinmoe.config.io import build
from swinmoe.errors import ConfigError

NAN, INF = math.nan, math.inf

NONSENSE: dict[str, list[Any]] = {
    "name": ["", " ", ".", "..", "a/b", "/a", "a\\b", "a\0"],
    "train.epochs": [0, -1, NAN, INF],
    "train.steps": [0, -1],
    "train.batch_size": [0, -1],
    "train.eval_batch_size": [0],
    "train.accumulation": [0],
    "train.label_smoothing": [-0.1, 1, NAN],
    "train.ema_decay": [0, 1, 1.5, -0.5, NAN],
    "train.eval_every_epochs": [0, -1, NAN],
    "train.dead_expert_window": [0],
    "checkpoint.every_steps": [-1],
    "checkpoint.every_epochs": [-1],
    "checkpoint.keep_last": [0, -1],
    "checkpoint.keep_best": [-1],
    "log.every_steps": [0, -1],
    "log.peak_flops": [0, -1.0, NAN, INF],
    "optim.base_lr": [0, -1e-3, NAN, INF],
    "optim.lr_batch": [-1],
    "optim.betas": [[1, 0.9], [0.9, 1], [-0.1, 0.9], [0.9, NAN]],
    "optim.eps": [0, -1e-8, NAN],
    "optim.weight_decay": [-0.1, NAN, INF],
    "optim.clip_grad_norm": [0, -1, NAN, INF],
    "optim.layer_decay": [0, -0.5, 1.1, NAN],
    "finetune.upcycle.noise": [-0.1, NAN, INF],
    "finetune.upcycle.drop": [-0.1, 1, NAN],
    "schedule.warmup_epochs": [-1, NAN],
    "schedule.warmup_steps": [-1],
    "schedule.warmup_lr": [-1, NAN],
    "schedule.min_lr": [-1, NAN],
    "parallel.ep_size": [0],
    "parallel.weight_group": [0],
    "parallel.local_size": [0],
    "parallel.chunks": [0],
    "parallel.timeout_minutes": [0, -1, NAN, INF],
    "data.image_size": [0, [0, 8], [8, -1]],
    "data.holdout": [-1],
    "data.limit": [0, -1],
    "data.num_classes": [0, -1],
    "data.shuffle_window": [0, -1],
    "data.channels": [0, 2, 4],
    "data.synthetic_samples": [0],
    "data.synthetic_classes": [0],
    "data.workers": [-1],
    "data.augment.crop_padding": [-1],
    "data.augment.random_resized_crop": [[0.0, 1.0], [0.5, 0.2], [0.5, 1.5], [NAN, 1.0], [0.1, NAN]],
    "data.augment.horizontal_flip": [-0.1, 1.1, NAN],
    "data.augment.color_jitter": [-1, NAN, INF],
    "data.augment.random_erasing": [-0.1, 1.1, NAN],
    "data.mixup.mixup": [-1, NAN, INF],
    "data.mixup.cutmix": [-1, NAN],
    "data.mixup.prob": [-0.1, 1.1, NAN],
    "data.mixup.switch_prob": [-0.1, 1.1, NAN],
    "model.img_size": [0],
    "model.patch_size": [0],
    "model.window_size": [0, [4, 0]],
    "model.in_chans": [0],
    "model.num_classes": [-1],
    "model.embed_dim": [0, -96],
    "model.depths": [[-1, 1]],
    "model.num_heads": [[0, 1]],
    "model.pretrained_window_sizes": [[-1, 4], [[4, -1], 4]],
    "model.mlp_ratio": [0, -1, NAN, INF],
    "model.drop_rate": [-0.1, 1, NAN],
    "model.attn_drop_rate": [-0.1, 1, NAN],
    "model.drop_path_rate": [-0.1, 1, NAN],
    "model.extra_norm_every": [-1],
    "model.res_post_norm_init": [-1, NAN, INF],
    "model.init_std": [-0.1, NAN, INF],
    "model.mask_value": [100, NAN, -INF],
    "model.attention_chunks": [0, -1, [1, 0]],
    "model.moe.num_experts": [0],
    "model.moe.top_k": [0],
    "model.moe.shared_expert_ratio": [-1, NAN],
    "model.moe.router.noise": [-1, NAN, INF],
    "model.moe.router.bias_update_rate": [-1, NAN],
    "model.moe.router.proj_dim": [0],
    "model.moe.router.init_temperature": [0, -1, NAN],
    "model.moe.capacity.train.factor": [NAN, INF],
    "model.moe.capacity.train.min_slots": [-1],
    "model.moe.capacity.train.adapt.max_drop": [-0.1, 1, NAN],
    "model.moe.capacity.train.adapt.floor": [-0.1, NAN, INF],
    "model.moe.capacity.train.adapt.ceiling": [0, NAN, INF],
    "model.moe.capacity.train.adapt.margin": [-0.1, NAN, INF],
    "model.moe.capacity.train.adapt.hysteresis": [-0.1, NAN, INF],
    "model.moe.capacity.train.adapt.every": [0],
    "model.moe.losses.gshard": [-1, NAN],
    "model.moe.losses.importance": [-1, NAN],
    "model.moe.losses.load": [-1, NAN],
    "model.moe.losses.importance_load": [-1, NAN],
    "model.moe.losses.importance_load_tutel": [-1, NAN],
    "model.moe.losses.z": [-1, NAN],
    "model.moe.experts.hidden_ratio": [0, NAN],
    "model.moe.experts.dropout": [-0.1, 1, NAN],
}
ANY_WHOLE_NUMBER = {"seed", "data.holdout_seed", "finetune.upcycle.seed"}
PLACES = {"model.moe_blocks", "model.grad_checkpointing"}
"""Checked against the depths, see test_validation.py and test_sequential.py."""


def _tree(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    value["model"] = {"preset": "swin_moe_micro"} | value.get("model", {})
    return value


def _numeric_keys(kind: type, path: str = "") -> set[str]:
    """Dotted keys of every number (or tuple of numbers) in a dataclass and those inside it."""
    keys: set[str] = set()
    for name, hint in get_type_hints(kind).items():
        parts = _parts(hint)
        inner = next((part for part in parts if is_dataclass(part)), None)
        if inner is not None:
            keys |= _numeric_keys(inner, f"{path}{name}.")
        elif {int, float} & parts:
            keys.add(f"{path}{name}")
    return keys


def _parts(hint: Any) -> set[Any]:
    return {hint}.union(*(_parts(part) for part in get_args(hint)))


def test_no_number_of_a_run_is_forgotten() -> None:
    policy = ("factor", "min_slots", *(f"adapt.{field.name}" for field in fields(AdaptConfig)))
    same_class = {
        f"model.moe.capacity.{of}.{name}" for of in ("eval", "layers.train", "layers.eval") for name in policy
    }
    assert _numeric_keys(RunConfig) - same_class == set(NONSENSE) - {"name"} | ANY_WHOLE_NUMBER | PLACES


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NONSENSE.items() for value in values])
def test_nonsense_is_refused_by_its_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        build(RunConfig, _tree(key, value))
    section, _, name = key.rpartition(".")
    assert name in str(caught.value)
    assert section.removeprefix("model.").split(".")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.betas", [0, 0]),
        ("optim.weight_decay", 0),
        ("optim.clip_grad_norm", None),
        ("train.label_smoothing", 0),
        ("train.steps", 1),
        ("train.eval_every_epochs", None),
        ("checkpoint.every_epochs", 0),
        ("checkpoint.keep_last", 1),
        ("checkpoint.keep_best", 0),
        ("data.augment.random_resized_crop", [1, 1]),
        ("data.augment.horizontal_flip", 1),
        ("data.mixup.prob", 0),
        ("data.limit", 1),
        ("model.num_classes", 0),
        ("model.mask_value", -100.0),
        ("model.pretrained_window_sizes", [0, [4, 6]]),
        ("model.moe.router.proj_dim", 1),
        ("seed", -1),
        ("name", "a.b-c_1 x"),
    ],
)
def test_the_edge_of_what_is_possible_passes(key: str, value: Any) -> None:
    build(RunConfig, _tree(key, value))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sample_images": 0}, "compare.sample_images=0 must be at least 1"),
        ({"match": "seconds", "budget_seconds": 0}, "compare.budget_seconds=0.0 must be above 0; give the accumulated"),
        ({"budget_seconds": INF}, "compare.budget_seconds=inf must be above 0 and finite"),
        ({"name": "../x"}, "name='../x' is not a plain folder name; .* the folder above it is output_dir"),
        ({"arms": {"a/b": {}}}, "arm name='a/b' is not a plain folder name"),
        ({"seeds": [1, 2, 1]}, r"compare.seeds=\[1, 2, 1\] names a seed twice"),
    ],
)
def test_nonsense_in_a_comparison(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(CompareConfig, {"arms": {"one": {}}, **values})


def test_a_dataclass_made_without_yaml_is_checked_too_and_all_its_mistakes_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        OptimConfig(base_lr=-1.0, betas=(0.9, 1.0), eps=NAN)
    assert str(caught.value).splitlines() == [
        "optim.base_lr=-1.0 must be above 0; use e.g. 1e-3",
        "optim.betas=(0.9, 1.0) must be in [0, 1); use e.g. [0.9, 0.999]",
        "optim.eps=nan must be above 0 and finite; use e.g. 1e-8",
    ]


@pytest.mark.parametrize(
    ("allowed", "said", "inside", "outside"),
    [
        (at_least(1), "at least 1", [1, 10**400], [0, NAN, INF]),
        (above(0), "above 0", [5e-324], [0, -1, INF]),
        (at_most(0), "at most 0", [0, -100.0], [1, -INF]),
        (probability(), "in [0, 1]", [0, 0.5, 1], [-0.1, 1.1, NAN]),
        (below_one(), "in [0, 1)", [0, 0.5], [1, NAN]),
        (Range(0, 1, low_open=True, high_open=True), "in (0, 1)", [0.5], [0, 1]),
        (Range(), "a finite number", [-1.0, 0], [NAN, INF, -INF]),
    ],
)
def test_ranges(allowed: Range, said: str, inside: list[float], outside: list[float]) -> None:
    assert str(allowed) == said
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)
