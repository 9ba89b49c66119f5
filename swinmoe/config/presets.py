"""Named models, each with its source. A preset is a set of plain `ModelConfig` values; nothing is built here.

Names say what they are: `swin_<lineage>_<size>_<image side>_w<window>[_<experts>]`.

- `swin_v1_t_224_w7`: Swin V1 tiny at 224 px with 7x7 windows.
- `swin_v2_b_384_w12to24`: V2 base at 384 px with 24x24 windows, fine-tuned from a model pre-trained with window 12,
  by whose size the offsets of its position bias are still measured.
- `swin_moe_s_192_w12_e32_cosine`: Swin-MoE small, 32 experts behind a cosine router (`_k2`: two experts per token;
  `_dense`: Microsoft's dense baseline, which differs in initial scale and for B in drop path too. For a matched twin
  set `moe: null` on the sparse preset).
- `swin_v2_mini_16_p2_w4_e8`: small images; `p2` is the patch, every `mini` takes one grey channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from swinmoe.errors import ConfigError, did_you_mean

Values = dict[str, Any]

V1_PAPER = "microsoft/Swin-Transformer configs/swin; Liu et al. 2021 (Swin Transformer, arXiv 2103.14030)"
V2_PAPER = "microsoft/Swin-Transformer configs/swinv2; Liu et al. 2022 (Swin Transformer V2, arXiv 2111.09883)"
MOE_PAPER = "microsoft/Swin-Transformer configs/swinmoe; Hwang et al. 2023 (Tutel, arXiv 2206.03382), table 11"
OURS = "swinmoe's own, for small images"

SIZES: dict[str, Values] = {
    "t": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "s": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "b": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "l": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
    "h": {"embed_dim": 352, "depths": (2, 2, 18, 2), "num_heads": (11, 22, 44, 88)},
    "g": {"embed_dim": 512, "depths": (2, 2, 42, 4), "num_heads": (16, 32, 64, 128)},
}
"""Widths and depths of both papers (V1 §3.3, V2 §3.6). Heads of H and G are not printed there: 32 channels each, as in
all other sizes."""

DROP_PATH_1K = {"t": 0.2, "s": 0.3, "b": 0.5}
"""ImageNet-1K from scratch, V1 and V2 alike."""
DROP_PATH_22K = 0.2
"""B and L on ImageNet-22K and fine-tuned from it. Not published for H and G, which take it over."""


def _pair(side: int) -> tuple[int, int]:
    return (side, side)


def _v1(size: str, side: int, window: int, drop_path: float) -> Values:
    shape = {"img_size": _pair(side), "window_size": _pair(window), "drop_path_rate": drop_path}
    return {"style": "v1", **SIZES[size], **shape}


def _v2(size: str, side: int, window: int, drop_path: float) -> Values:
    values = {**_v1(size, side, window, drop_path), "style": "v2"}
    if size in ("h", "g"):  # paper §3.6: one more norm on the main branch every 6 blocks, in the two largest only
        values |= {"extra_norm_every": 6, "res_post_norm_init": 1e-5}
    return values


def _swin_moe(size: str, drop_path: float, moe: Values | None) -> Values:
    """Microsoft's hybrid at 192 px on ImageNet-22K; sparse models start from a smaller scale than the dense ones."""
    values = {**_v1(size, 192, 12, drop_path), "style": "swin_moe", "num_classes": 21841, "mlp_fc2_bias": False}
    if moe is None:
        return values
    odd_blocks = tuple(range(1, SIZES[size]["depths"][2], 2))
    return values | {"init_std": 0.005, "moe": moe, "moe_blocks": ((), (), odd_blocks, (1,))}


def _experts(num_experts: int, top_k: int = 1, router: str = "linear") -> Values:
    """Swin-MoE's expert layer, its balance loss as V-MoE defines it; `configs/train` names Tutel's literal form."""
    capacity = {"kind": "fixed", "factor": 1.25}
    return {
        "num_experts": num_experts,
        "top_k": top_k,
        "router": {"type": router, "noise": 1.0, "batch_prioritized": True, "proj_dim": 256, "init_temperature": 0.5},
        "capacity": {"train": capacity, "eval": capacity},
        "losses": {"gshard": 0.0, "importance_load": 0.01, "over_layers": "sum"},
        "experts": {"dropout": 0.1, "fc2_bias": "frozen-zero"},
    }


def _every_second_block(depths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Expert layers in the odd blocks of the last stage."""
    return (*((),) * (len(depths) - 1), tuple(range(1, depths[-1], 2)))


_GRIDS: dict[str, Values] = {
    # 8x8 tokens, then 4x4: one model for digits at their own 8 px and scaled up to 16 or 32
    "8_p1_w2": {"img_size": (8, 8), "patch_size": (1, 1), "window_size": (2, 2)},
    "8_p1_w4": {"img_size": (8, 8), "patch_size": (1, 1), "window_size": (4, 4)},
    "16_p2_w4": {"img_size": (16, 16), "patch_size": (2, 2), "window_size": (4, 4)},
    "32_p4_w4": {"img_size": (32, 32), "patch_size": (4, 4), "window_size": (4, 4)},
    # 16x16 tokens in four windows, then 8x8 in one
    "32_p2_w8": {"img_size": (32, 32), "patch_size": (2, 2), "window_size": (8, 8)},
    # Fashion-MNIST: 14x14 tokens in four windows, then 7x7 in one
    "28_p2_w7": {"img_size": (28, 28), "patch_size": (2, 2), "window_size": (7, 7)},
    # the same images at a third of the cost: 7x7 tokens throughout
    "28_p4_w7": {
        "img_size": (28, 28),
        "patch_size": (4, 4),
        "window_size": (7, 7),
        "embed_dim": 48,
        "depths": (6,),
        "num_heads": (3,),
    },
}
_MINI: Values = {
    "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depths": (2, 6), "num_heads": (2, 4), "drop_path_rate": 0.05,
}  # fmt: skip
_MICRO: Values = {
    "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "patch_size": (2, 2), "window_size": (4, 4),
    "img_size": (32, 32), "num_classes": 10,
}  # fmt: skip


def _named() -> dict[str, tuple[Values, str]]:
    """Every preset: name -> (values, source)."""
    named: dict[str, tuple[Values, str]] = {}
    for size, drop_path in DROP_PATH_1K.items():
        named[f"swin_v1_{size}_224_w7"] = (_v1(size, 224, 7, drop_path), f"{V1_PAPER}, §3.3")
        for window in (8, 16):
            named[f"swin_v2_{size}_256_w{window}"] = (_v2(size, 256, window, drop_path), f"{V2_PAPER}, §3.6")
    named["swin_v1_l_224_w7"] = (_v1("l", 224, 7, DROP_PATH_22K), f"{V1_PAPER}, §3.3")
    named["swin_v1_b_384_w12"] = (_v1("b", 384, 12, DROP_PATH_1K["b"]), f"{V1_PAPER}, table 1a")
    named["swin_v1_l_384_w12"] = (_v1("l", 384, 12, DROP_PATH_22K), f"{V1_PAPER}, table 1b")

    for size in ("b", "l", "h", "g"):
        for side, window in ((192, 12), (256, 16), (384, 24)):
            values = _v2(size, side, window, DROP_PATH_22K)
            named.setdefault(f"swin_v2_{size}_{side}_w{window}", (values, f"{V2_PAPER}, §3.6"))
    for size in ("b", "l"):
        for side, window in ((256, 16), (384, 24)):
            # stage 4 of the 192 px model is 6x6, so its window of 12 was 6 there
            values = {**_v2(size, side, window, DROP_PATH_22K), "pretrained_window_sizes": (12, 12, 12, 6)}
            named[f"swin_v2_{size}_{side}_w12to{window}"] = (values, f"{V2_PAPER}, §3.3 and §3.6")

    for size, drop_path in (("s", 0.2), ("b", 0.3)):
        stem = f"swin_moe_{size}_192_w12"
        named[f"{stem}_dense"] = (_swin_moe(size, 0.2, None), MOE_PAPER)
        for experts in (8, 16, 32, 64, 128):
            named[f"{stem}_e{experts}"] = (_swin_moe(size, drop_path, _experts(experts)), MOE_PAPER)
        cosine = _swin_moe(size, drop_path, _experts(32, router="cosine"))
        named[f"{stem}_e32_cosine"] = (cosine, f"{MOE_PAPER}; table 13")
        named[f"{stem}_e32_k2"] = (_swin_moe(size, drop_path, _experts(32, top_k=2)), f"{MOE_PAPER}; table 12")

    for grid, shape in _GRIDS.items():
        for lineage, style in (("v1", "v1"), ("v2", "v2"), ("moe", "swin_moe")):
            values = {"style": style, **_MINI, **shape}
            sparse = {**values, "moe": {"num_experts": 8}, "moe_blocks": _every_second_block(values["depths"])}
            dense = f"swin_{lineage}_mini_{grid}" + ("_dense" if lineage == "moe" else "")
            named[dense] = (values, OURS)
            named[f"swin_{lineage}_mini_{grid}_e8"] = (sparse, OURS)
    named["swin_micro"] = ({"style": "v1", **_MICRO}, OURS)
    named["swin_moe_micro"] = (
        {"style": "swin_moe", **_MICRO, "moe": {"num_experts": 8}, "moe_blocks": ((), (1,))},
        OURS,
    )
    return named


_NAMED = _named()
PRESETS: Mapping[str, Values] = {name: values for name, (values, _) in _NAMED.items()}
"""Name -> plain `ModelConfig` values."""
PRESET_SOURCES: Mapping[str, str] = {name: source for name, (_, source) in _NAMED.items()}
"""Name -> the paper, table or repository that the values come from."""


def preset_values(name: str) -> Values:
    """The plain values of a named preset, the caller's own copy; `ConfigError` with suggestions for an unknown name."""
    if not isinstance(name, str):  # YAML may hold anything here
        raise ConfigError(f"model.preset={name!r} is not a name; use one that `swinmoe models` lists")
    if name not in PRESETS:
        families = ", ".join(sorted({n.split("_w")[0] for n in PRESETS}))
        raise ConfigError(f"unknown model preset {name!r}{did_you_mean(name, PRESETS) or '; families: ' + families}")
    return {"preset": name, **deepcopy(PRESETS[name])}


def describe_presets() -> dict[str, str]:
    """Name -> one line: image size, width, depths, experts, and the source."""
    lines = {}
    for name, values in PRESETS.items():
        moe = values.get("moe")
        experts = f", {moe['num_experts']} experts" if moe else ""
        height, width = values["img_size"]
        depths = "-".join(map(str, values["depths"]))
        lines[name] = (
            f"{height}x{width} px, width {values['embed_dim']}, depths {depths}{experts}; {PRESET_SOURCES[name]}"
        )
    return lines
