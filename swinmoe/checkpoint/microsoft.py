"""Microsoft's names, which are ours but for tables that follow from the configuration (and old timm's, the same)."""

from __future__ import annotations

from swinmoe.checkpoint.rules import Layout, rename

DERIVED = (r"(.*\.)?(relative_position_index|relative_coords_table|attn_mask)",)
"""Index, offsets and mask. They depend on the window and the image, which is why they are not taken over."""

SAME = rename(
    [
        ("layers.{i}.blocks.{j}.attn.cpb_mlp.{rest}", "layers.{i}.blocks.{j}.attn.cpb_mlp.{rest}"),
        ("layers.{i}.blocks.{j}.attn.rpe_mlp.{rest}", "layers.{i}.blocks.{j}.attn.cpb_mlp.{rest}"),  # SimMIM's V2
        *(
            (text, text)
            for text in (
                "layers.{i}.blocks.{j}.{rest}",
                "layers.{i}.downsample.{rest}",
                "patch_embed.{rest}",
                "absolute_pos_embed",
                "norm.{rest}",
                "head.{rest}",
            )
        ),
    ]
)

MICROSOFT = Layout("microsoft", SAME, DERIVED)
