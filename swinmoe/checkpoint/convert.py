"""From anybody's weights to a model of ours, whose configuration is given, found beside the weights, or inferred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from swinmoe.checkpoint.infer import habits, infer_config
from swinmoe.checkpoint.load import ClassMap, load_pretrained
from swinmoe.checkpoint.load_report import LoadReport
from swinmoe.checkpoint.source import Source
from swinmoe.config import ModelConfig
from swinmoe.config.io import build, merge, with_overrides
from swinmoe.models import SwinTransformer, build_model


def model_of(
    source: Source,
    *,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
    class_map: ClassMap | None = None,
) -> tuple[SwinTransformer, LoadReport]:
    """The model that weights belong to, with them in it, on the CPU, in their floating type.

    Args:
        source: weights under our names (`read_source`).
        preset: a named model; None = the configuration beside the weights, or what their shapes tell.
        overrides: keys of `ModelConfig` on top of that.
        allow: patterns of names that need not fit.
        class_map: for each class of the model its index among the source's.

    Raises:
        ConfigError: no such preset or key.
        CheckpointError: shapes do not tell enough, or weights do not fit.
    """
    over = dict(overrides or {})
    if preset is not None:
        config = build(ModelConfig, merge(merge({"preset": preset}, habits(source)), over))
    elif source.config is not None:
        config = with_overrides(source.config, over)
    else:
        config = infer_config(source, over)
    model = build_model(config, dtype=source.dtype)
    return model, load_pretrained(model, source, allow=allow, class_map=class_map)
