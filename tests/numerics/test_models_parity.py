"""The same weights give the same logits in timm and torchvision, for the published sizes.

By default the third stage has two blocks, which takes every kind of block, shift and merging there is, S is left out
(it is T with a deeper third stage) and B runs at the smallest resolution. With SWINMOE_FULL=1 every size runs in full
depth at every resolution, and `-s` shows the differences.
"""

from __future__ import annotations

import os

import pytest
import torch
from models_oracles import SIZES, gap, overwrite, sharpen_offsets, to_timm, to_torchvision
from torch import Tensor, nn

from swinmoe.config import ModelConfig
from swinmoe.models import SwinTransformer, build_model

FULL = os.environ.get("SWINMOE_FULL") == "1"
CLASSES = 11


def size_of(name: str) -> dict:
    return SIZES[name] if FULL else {**SIZES[name], "depths": (2, 2, 2, 2)}


def ours(style: str, name: str, img: int, window: int, **over) -> SwinTransformer:
    config = ModelConfig(
        style=style,
        img_size=(img, img),
        window_size=(window, window),
        num_classes=CLASSES,
        mask_value=-100.0,
        **size_of(name),
        **over,
    )
    model = build_model(config, dtype=torch.float64).eval()
    overwrite(model)
    return model


def timm_twin(model: SwinTransformer, style: str) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer as TimmV1
    from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmV2

    cfg = model.config
    kind = TimmV1 if style == "v1" else TimmV2
    twin = kind(
        img_size=cfg.img_size,
        window_size=cfg.window_size,
        embed_dim=cfg.embed_dim,
        depths=cfg.depths,
        num_heads=cfg.num_heads,
        num_classes=cfg.num_classes,
    )
    twin = twin.double().eval()
    twin.load_state_dict(to_timm(model.state_dict()))
    sharpen_offsets(twin)
    return twin


def torchvision_twin(model: SwinTransformer, style: str) -> nn.Module:
    from torchvision.models import swin_transformer as tv

    cfg = model.config
    v2 = style == "v2"
    twin = tv.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=cfg.embed_dim,
        depths=list(cfg.depths),
        num_heads=list(cfg.num_heads),
        window_size=list(cfg.window_size),
        num_classes=cfg.num_classes,
        block=tv.SwinTransformerBlockV2 if v2 else tv.SwinTransformerBlock,
        downsample_layer=tv.PatchMergingV2 if v2 else tv.PatchMerging,
    )
    twin = twin.double().eval()
    report = twin.load_state_dict(to_torchvision(model.state_dict()), strict=False)
    assert not report.unexpected_keys
    assert all("relative_" in key and "bias_table" not in key for key in report.missing_keys), report.missing_keys
    sharpen_offsets(twin)
    return twin


@torch.no_grad()
def assert_same(model: SwinTransformer, twin: nn.Module, images: Tensor) -> None:
    double = model(images).logits
    exact = gap(double, twin(images))
    other = model(images.flip(-1)).logits
    assert gap(double, other) > 0.02 * float(double.abs().max())  # the logits are about the images, not their biases
    model, twin, images = model.float(), twin.float(), images.float()
    single, theirs = model(images).logits, twin(images)
    rounded = gap(single, theirs) / float(theirs.abs().max())
    if FULL:
        print(f"{type(twin).__module__} {tuple(images.shape)}: float64 {exact:.1e}, float32 {rounded:.1e} of max|y|")
    assert exact <= 1e-10
    assert rounded <= 1e-5


TIMM = [("v1", 224, 7), ("v1", 384, 12), ("v2", 256, 8), ("v2", 256, 16), ("v2", 384, 24)]


def sizes_of(cases: list[tuple], small: int) -> list[tuple]:
    """Each case with the sizes that run it; `small` is the image side up to which B runs by default."""
    names = ("t", "s", "b") if FULL else ("t", "b")
    return [(*case, name) for case in cases for name in names if FULL or name == "t" or case[1] <= small]


@pytest.mark.parametrize(("style", "img", "window", "name"), sizes_of(TIMM, 224))
def test_equals_timm(style: str, img: int, window: int, name: str) -> None:
    model = ours(style, name, img, window)
    images = torch.randn(1, 3, img, img, dtype=torch.float64)
    assert_same(model, timm_twin(model, style), images)


TORCHVISION = [
    ("v1", 7, (224, 224)),
    ("v2", 8, (256, 256)),
    # Nothing is a multiple: every stage pads, one axis more than the other, and odd maps are merged.
    ("v1", 7, (260, 228)),
    ("v2", 8, (300, 260)),
]


@pytest.mark.parametrize(("style", "window", "size", "name"), sizes_of(TORCHVISION, 7))
def test_equals_torchvision(style: str, window: int, size: tuple[int, int], name: str) -> None:
    model = ours(style, name, 32 * window, window, pad_keys="attend")
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    assert_same(model, torchvision_twin(model, style), images)


@pytest.mark.parametrize("style", ["v1", "v2"])
def test_pad_policy_equals_torchvision_below_the_window(style: str) -> None:
    """Where the last map is smaller than the window, torchvision pads it; `small_map="pad"` does the same."""
    window = 7 if style == "v1" else 8
    model = ours(style, "t", 32 * window, window, pad_keys="attend", small_map="pad")
    images = torch.randn(1, 3, 152, 120, dtype=torch.float64)
    assert_same(model, torchvision_twin(model, style), images)
