"""The smallest sparse Swin that the digits make sense for, for tests of whole runs; each adds keys of its own."""

from __future__ import annotations

from typing import Any

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
