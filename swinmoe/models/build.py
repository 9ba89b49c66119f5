"""From a configuration or a preset's name to a model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import is_dataclass
from typing import Any

import torch

from swinmoe.config import ModelConfig
from swinmoe.config.io import build, to_tree
from swinmoe.models.swin import SwinTransformer


def build_model(
    cfg: ModelConfig,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SwinTransformer:
    """A model with initial weights that depend on `cfg`, `seed` and parameter names only.

    `device="meta"` gives shapes without storage, in no time at any size. Weights are drawn in float32 and then cast.
    """
    with torch.device(device) if device is not None else nullcontext():
        model = SwinTransformer(cfg, seed)
    if dtype is not None:
        model = model.to(dtype=dtype)
        model.prepare_tables()
    return model


def preset_config(name: str, **overrides: Any) -> ModelConfig:
    """A preset's configuration with any keys of `ModelConfig` laid on top.

    Overrides may be plain values, nested mappings (merged into the preset's) or config objects (every key of which
    counts, defaults too).

    Raises:
        ConfigError: an unknown preset or key (with suggestions), or values that contradict each other.
    """
    plain = {key: to_tree(value) if is_dataclass(value) else value for key, value in overrides.items()}
    return build(ModelConfig, {"preset": name, **plain})


def create_model(
    name: str, *, seed: int = 0, device: torch.device | str | None = None, **overrides: Any
) -> SwinTransformer:
    """A preset's model by name, with keys of `ModelConfig` laid on top, e.g. `num_classes=10, moe=None`.

    See `preset_config` for overrides and errors, `build_model` for `seed` and `device`.
    """
    return build_model(preset_config(name, **overrides), seed=seed, device=device)
