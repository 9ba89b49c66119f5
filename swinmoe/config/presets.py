"""Named models, each with its source. A preset is a function of nothing that returns plain `ModelConfig` values."""

from __future__ import annotations

from typing import Any

from swinmoe.errors import ConfigError, did_you_mean

_TINY = {"patch_size": (2, 2), "window_size": (4, 4), "img_size": (32, 32), "num_classes": 10}

PRESETS: dict[str, dict[str, Any]] = {
    "swin_micro": {"style": "v1", "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), **_TINY},
    "swin_moe_micro": {
        "style": "swin_moe", "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), **_TINY,
        "moe": {"num_experts": 8}, "moe_blocks": ((), (1,)),
    },
}


def preset_values(name: str) -> dict[str, Any]:
    """The plain values of a named preset; `ConfigError` with suggestions for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model preset {name!r}{did_you_mean(name, PRESETS) or '; known: ' + ', '.join(sorted(PRESETS))}")
    return {"preset": name, **PRESETS[name]}
