"""Small models that several test files share; each adds keys of its own. The first is the smallest sparse Swin that the
digits make sense for."""

from __future__ import annotations

from typing import Any

from swinmoe.config import ModelConfig

MICRO: dict[str, Any] = {
    "preset": "swin_moe_micro",
    "in_chans": 1,
    "embed_dim": 16,
    "patch_size": 4,
    "num_heads": [1, 2],
}

UNBALANCED: dict[str, Any] = {
    **MICRO,
    "img_size": 16,
    "num_classes": 10,
    "depths": [2, 2],
    "moe_blocks": [[1], [1]],
    "drop_path_rate": 0.1,
    "moe": {
        "num_experts": 4,
        "router": {"noise": 1.0},
        "losses": {"gshard": 0.0},
        "capacity": {"train": {"kind": "fixed", "factor": 1.25}},
    },
}
"""One whose experts' loads differ, so that capacity matters."""


def two_stages(style: str, side: int, **over: Any) -> ModelConfig:
    """Four blocks and two, some shifted where the map has several windows; stochastic depth."""
    return ModelConfig(
        style=style,
        img_size=(side, side),
        patch_size=(2, 2),
        embed_dim=8,
        depths=(4, 2),
        num_heads=(1, 2),
        window_size=(4, 4),
        num_classes=3,
        res_post_norm_init=0.5,
        drop_path_rate=0.3,
        **over,
    )
