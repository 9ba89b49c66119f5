"""Layer-wise rates: the nearer the input, the slower (BEiT, Bao et al. 2022; with Swin: SimMIM, Xie et al. 2022).

Layer ids are those of Microsoft's Swin-Transformer code, so that its published decays (0.9 for Swin-B, 0.87 for V2-G)
mean the same here:

    patch_embed, mask_token                     0
    block k, counted over all stages from 0     k + 1
    patch merging after a stage                 as the stage's last block
    all else: norm, head, absolute positions    number of blocks + 1

The rate of layer i is base · decay^(last − i): the head learns at the full rate. That absolute positions count as last,
although they stand at the input, is the original's.
"""

from __future__ import annotations

from collections.abc import Sequence


def layer_id(name: str, depths: Sequence[int]) -> int:
    """Id of the layer that a parameter of a `SwinTransformer` belongs to, 0 to `last_layer(depths)`.

    Args:
        name: as in `named_parameters`.
        depths: blocks per stage.
    """
    if name.startswith(("patch_embed.", "mask_token")):
        return 0
    parts = name.split(".")
    if parts[0] != "layers":
        return last_layer(depths)
    stage = int(parts[1])
    if parts[2] == "downsample":
        return sum(depths[: stage + 1])
    return sum(depths[:stage]) + int(parts[3]) + 1


def last_layer(depths: Sequence[int]) -> int:
    """The largest id: that of norm and head."""
    return sum(depths) + 1


def rate_scale_of(name: str, depths: Sequence[int], decay: float) -> float:
    """Factor on the learning rate of a parameter: decay^(last − id)."""
    return float(decay ** (last_layer(depths) - layer_id(name, depths)))
