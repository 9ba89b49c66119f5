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
