"""What model weights belong to, as far as shapes tell: a configuration for files that come without one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from swinmoe.checkpoint.load import plain_windows, source_references
from swinmoe.checkpoint.resize import table_window
from swinmoe.checkpoint.source import Source
from swinmoe.config import ModelConfig
from swinmoe.config.io import build, merge
from swinmoe.errors import CheckpointError
from swinmoe.models.stage import stage_window

Pair = tuple[int, int]

_MASK = -100.0
_PADS = {"pad_keys": "attend", "small_map": "pad"}
_HABITS: dict[str, dict[str, Any]] = {
    "microsoft": {"mask_value": _MASK},
    "swin-moe": {"mask_value": _MASK},
    "timm": {"mask_value": _MASK},
    "torchvision": {**_PADS, "mask_value": _MASK},
    "mmdet": {**_PADS, "mask_value": _MASK},
    "huggingface": {"pad_keys": "attend", "mask_value": _MASK},
    "huggingface-v2": {"pad_keys": "attend", "mask_value": 2 * _MASK},
}


def habits(source: Source) -> dict[str, Any]:
    """What the source's code does that no shape tells, as keys of `ModelConfig`.

    How it pads maps that are no multiple of the window, or smaller than it; and what it adds to the logits of tokens
    that must not see each other: -100, which is not out of reach of Swin V2's logits (scales go up to 100), so that
    hiding them altogether is another function. Hugging Face's V2 adds its -100 twice.
    """
    if source.config is not None:
        return {key: getattr(source.config, key) for key in ("pad_keys", "small_map", "mask_value")}
    layout = source.layout.removesuffix("-bare")
    return dict(_HABITS.get(layout) or _HABITS.get(layout.split("-")[0]) or {})


def infer_config(source: Source, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """The configuration of a Swin Transformer by its weights.

    Image and window come from bias tables or stored offsets; where the image cannot be told it is the smallest that
    fills a window in the last stage, as in the published models.

    Args:
        source: weights under our names.
        overrides: keys of `ModelConfig`, which count more.

    Raises:
        CheckpointError: no Swin Transformer; or shapes do not tell all, by name of what must be said.
    """
    named, over = source.named, dict(overrides or {})
    if "patch_embed.proj.weight" not in named:
        raise CheckpointError(
            f"{source.label} is no whole model (it has no patch embedding), so no configuration follows from it"
        )
    if any(".router." in name for name in named) and not isinstance(over.get("moe"), Mapping):
        raise CheckpointError(
            f"{source.label} has experts, and weights do not tell how many a token visits nor what capacity they have; "
            "name the model with --preset (`swinmoe models swin_moe`), e.g. swin_moe_s_192_w12_e32"
        )
    dim, channels, height, width = named["patch_embed.proj.weight"].shape
    blocks = _blocks(named)
    if not blocks:
        keys = ", ".join([*named, *source.unused][:3])
        raise CheckpointError(
            f"{source.label} holds no Swin Transformer (nothing like layers.0.blocks.0, but {keys}, ...); experts for "
            "other timm and torchvision models come by swinmoe.sparsify"
        )
    first = "layers.0.blocks.0"
    cosine = f"{first}.attn.logit_scale" in named
    style = "v2" if cosine else "swin_moe" if f"{first}.attn.cpb_mlp.0.weight" in named else "v1"
    dense = [name for name in named if name.endswith(".mlp.fc1.weight")]
    values: dict[str, Any] = {
        "style": style,
        "patch_size": (height, width),
        "in_chans": channels,
        "num_classes": named["head.weight"].shape[0] if "head.weight" in named else 0,
        "embed_dim": dim,
        "depths": tuple(blocks),
        "num_heads": tuple(_heads(named, stage) for stage in range(len(blocks))),
        "qkv_bias": f"{first}.attn.{'q_bias' if cosine else 'qkv.bias'}" in named,
        "mlp_fc2_bias": any(name.endswith(".mlp.fc2.bias") for name in named) or not dense,
        "patch_norm": "patch_embed.norm.weight" in named,
        "absolute_pos_embed": "absolute_pos_embed" in named,
        "drop_path_rate": 0.0,
        **habits(source),
        **source.hints,
    }
    if dense:
        values["mlp_ratio"] = named[dense[0]].shape[0] / named[dense[0]].shape[1]
    extra = [
        int(name.split(".")[3]) for name in named if re.fullmatch(r"layers\.\d+\.blocks\.\d+\.norm3\.weight", name)
    ]
    if extra:
        values["extra_norm_every"] = min(extra) + 1
    if not {"window_size", "img_size"} <= {*over, *source.hints}:
        values |= _geometry(source, len(blocks), values)
    config = build(ModelConfig, merge(values, over))
    references = source_references(source, config)
    own = tuple(stage_window(config, stage) for stage in range(len(blocks)))
    if references not in (None, own) and "pretrained_window_sizes" not in over:
        config = build(ModelConfig, merge(merge(values, over), {"pretrained_window_sizes": plain_windows(references)}))
    return config


def _blocks(named: Mapping[str, Tensor]) -> list[int]:
    depths: dict[int, int] = {}
    for name in named:
        found = re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name)
        if found:
            depths[int(found[1])] = max(depths.get(int(found[1]), 0), int(found[2]) + 1)
    return [depths.get(stage, 0) for stage in range(max(depths, default=-1) + 1)]


def _heads(named: Mapping[str, Tensor], stage: int) -> int:
    attention = f"layers.{stage}.blocks.0.attn"
    for name, axis in (("logit_scale", 0), ("relative_position_bias_table", 1), ("cpb_mlp.2.weight", 0)):
        if f"{attention}.{name}" in named:
            return int(named[f"{attention}.{name}"].shape[axis])
    raise CheckpointError(f"{attention} has no position bias, which every Swin Transformer has; the file is incomplete")


def _geometry(source: Source, stages: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Window and image. Where a window is smaller than the first's, it shrank to its map; a mask tells the map too."""
    windows = [_window(source, stage) for stage in range(stages)]
    if any(window is None for window in windows):
        raise CheckpointError(
            f"{source.label} does not tell its window (this layout stores no tables of offsets); name the model with "
            "--preset, or say e.g. window_size=8 img_size=256"
        )
    (wh, ww), last = windows[0] or (0, 0), windows[-1] or (0, 0)
    patch, factor = values["patch_size"], 2 ** (stages - 1)
    image = tuple(side * step * factor for side, step in zip(last, patch, strict=True))
    mask = source.aside.get("layers.0.blocks.1.attn_mask")
    if mask is not None:
        across = math.isqrt(mask.shape[0])
        if across * across == mask.shape[0]:
            image = (across * wh * patch[0], across * ww * patch[1])
    return {"window_size": (wh, ww), "img_size": image}


def _window(source: Source, stage: int) -> Pair | None:
    attention = f"layers.{stage}.blocks.0.attn"
    table = source.named.get(f"{attention}.relative_position_bias_table")
    if table is not None:
        return table_window(table, None)
    offsets = source.aside.get(f"{attention}.relative_coords_table")
    return None if offsets is None else ((offsets.shape[1] + 1) // 2, (offsets.shape[2] + 1) // 2)
