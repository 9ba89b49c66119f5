"""The names of Hugging Face's `swin` and `swinv2`, which hold query, key and value apart.

Shapes: D width; weights of q, k and v (D, D) each, jointly (3D, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swinmoe.checkpoint.microsoft import DERIVED
from swinmoe.checkpoint.rules import Layout, Rule, rename
from swinmoe.config import ModelConfig

_BLOCK, _OURS = "encoder.layers.{i}.blocks.{j}", "layers.{i}.blocks.{j}"
_SELF = f"{_BLOCK}.attention.self"


def _join(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _split(joint: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.clone() for part in joint.chunk(3))


def _qkv(kind: str, home: str = _SELF, parts: Sequence[str] = ("query", "key", "value")) -> Rule:
    return Rule(tuple(f"{home}.{part}.{kind}" for part in parts), f"{_OURS}.attn.qkv.{kind}", _join, _split)


def _common(prefix: str) -> tuple[Rule, ...]:
    pairs = [
        ("embeddings.patch_embeddings.projection.{rest}", "patch_embed.proj.{rest}"),
        ("embeddings.norm.{rest}", "patch_embed.norm.{rest}"),
        (f"{_BLOCK}.layernorm_before.{{rest}}", f"{_OURS}.norm1.{{rest}}"),
        (f"{_BLOCK}.layernorm_after.{{rest}}", f"{_OURS}.norm2.{{rest}}"),
        (f"{_BLOCK}.attention.output.dense.{{rest}}", f"{_OURS}.attn.proj.{{rest}}"),
        (f"{_BLOCK}.intermediate.dense.{{rest}}", f"{_OURS}.mlp.fc1.{{rest}}"),
        (f"{_BLOCK}.output.dense.{{rest}}", f"{_OURS}.mlp.fc2.{{rest}}"),
        (f"{_SELF}.relative_position_bias_table", f"{_OURS}.attn.relative_position_bias_table"),
        (f"{_SELF}.logit_scale", f"{_OURS}.attn.logit_scale"),
        (f"{_SELF}.continuous_position_bias_mlp.{{rest}}", f"{_OURS}.attn.cpb_mlp.{{rest}}"),
        ("encoder.layers.{i}.downsample.{rest}", "layers.{i}.downsample.{rest}"),
        ("layernorm.{rest}", "norm.{rest}"),
    ]
    return rename([*((prefix + foreign, ours) for foreign, ours in pairs), ("classifier.{rest}", "head.{rest}")])


def _in_memory(prefix: str) -> tuple[Rule, ...]:
    """`swin` as transformers 5 names it in memory; its files have kept their names."""
    projections = ("q_proj", "k_proj", "v_proj")
    home = f"{prefix}{_BLOCK}.attention"
    table = "relative_position_bias_table"
    return (
        *(_qkv(kind, home, projections) for kind in ("weight", "bias")),
        *rename(
            [
                (f"{home}.relative_position_bias.{table}", f"{_OURS}.attn.{table}"),
                (f"{home}.o_proj.{{rest}}", f"{_OURS}.attn.proj.{{rest}}"),
                (f"{prefix}{_BLOCK}.mlp.{{rest}}", f"{_OURS}.mlp.{{rest}}"),
            ]
        ),
    )


def _prefixed(rule: Rule, prefix: str) -> Rule:
    names = (rule.foreign,) if isinstance(rule.foreign, str) else rule.foreign
    return Rule(tuple(prefix + name for name in names), rule.ours, rule.read, rule.write)


def _layout(name: str, prefix: str, *, cosine: bool) -> Layout:
    if cosine:  # no bias for k
        pairs = [("query", "q_bias"), ("value", "v_bias")]
        biases = rename([(f"{prefix}{_SELF}.{part}.bias", f"{_OURS}.attn.{ours}") for part, ours in pairs])
    else:
        biases = (_prefixed(_qkv("bias"), prefix),)
    rules = (_prefixed(_qkv("weight"), prefix), *biases, *_common(prefix), *_in_memory(prefix))
    return Layout(name, rules, DERIVED)


HUGGINGFACE_V1 = _layout("huggingface", "swin.", cosine=False)
HUGGINGFACE_V2 = _layout("huggingface-v2", "swinv2.", cosine=True)
HUGGINGFACE_V1_BARE = _layout("huggingface-bare", "", cosine=False)
HUGGINGFACE_V2_BARE = _layout("huggingface-v2-bare", "", cosine=True)
"""Bare: `SwinModel` and `Swinv2Model`, without a classifier and its prefix."""


def huggingface_config(cfg: ModelConfig) -> dict[str, Any]:
    """`config.json` with which transformers builds the same classifier.

    transformers takes square images, patches and windows only; who calls has checked that.
    """
    cosine = cfg.style == "v2"
    config: dict[str, Any] = {
        "architectures": ["Swinv2ForImageClassification" if cosine else "SwinForImageClassification"],
        "model_type": "swinv2" if cosine else "swin",
        "image_size": cfg.img_size[0],
        "patch_size": cfg.patch_size[0],
        "num_channels": cfg.in_chans,
        "embed_dim": cfg.embed_dim,
        "depths": list(cfg.depths),
        "num_heads": list(cfg.num_heads),
        "window_size": cfg.window_size[0],
        "mlp_ratio": cfg.mlp_ratio,
        "qkv_bias": cfg.qkv_bias,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": cfg.drop_rate,
        "attention_probs_dropout_prob": cfg.attn_drop_rate,
        "drop_path_rate": cfg.drop_path_rate,
        "use_absolute_embeddings": False,
        "id2label": {str(n): f"LABEL_{n}" for n in range(cfg.num_classes)},
        "label2id": {f"LABEL_{n}": n for n in range(cfg.num_classes)},
    }
    if cosine:
        config["pretrained_window_sizes"] = list(cfg.pretrained_window_sizes or (0,) * len(cfg.depths))
    return config


def settings_of(config: Any) -> dict[str, Any]:
    """What transformers' `config.json` of `swin` or `swinv2` says that weights do not; {} for any other."""
    if not isinstance(config, dict) or config.get("model_type") not in ("swin", "swinv2"):
        return {}
    names = {
        "image_size": "img_size",
        "patch_size": "patch_size",
        "window_size": "window_size",
        "drop_path_rate": "drop_path_rate",
        "hidden_dropout_prob": "drop_rate",
        "attention_probs_dropout_prob": "attn_drop_rate",
    }
    found = {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
    windows = config.get("pretrained_window_sizes")
    if windows and any(windows):
        found["pretrained_window_sizes"] = windows
    return found
