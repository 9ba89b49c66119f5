"""timm's names: since 0.9 a merging opens the next stage instead of closing its own, and the head is `head.fc`.

Older files have Microsoft's names. timm is not imported here.
"""

from __future__ import annotations

from swinmoe.checkpoint.microsoft import DERIVED, SAME
from swinmoe.checkpoint.rules import Layout, rename

TIMM = Layout(
    "timm",
    (
        *rename(
            [
                ("layers.{i+1}.downsample.{rest}", "layers.{i}.downsample.{rest}"),
                ("head.fc.{rest}", "head.{rest}"),
            ]
        ),
        *SAME,
    ),
    DERIVED,
)
