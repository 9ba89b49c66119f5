"""No leak across the seam of the cyclic shift: opposite edges of a map that is no multiple of the window never meet."""

from __future__ import annotations

import pytest
import torch
from models_oracles import overwrite, to_timm
from torch import Tensor

from swinmoe.config import ModelConfig
from swinmoe.models import SwinTransformer, build_model

WINDOW = 4


def one_shifted_stage(style: str, grid: int, **over) -> SwinTransformer:
    cfg = ModelConfig(
        style=style,
        img_size=(grid, grid),
        patch_size=(1, 1),
        in_chans=1,
        num_classes=2,
        embed_dim=8,
        depths=(2,),
        num_heads=(2,),
        window_size=(WINDOW, WINDOW),
        **over,
    )
    model = build_model(cfg, dtype=torch.float64).eval()
    overwrite(model)
    return model


def reach(before: Tensor, after: Tensor) -> list[int]:
    """Columns of the maps (H, W, D) that differ."""
    changed = (before - after).abs().amax((0, 2)) > 0
    return changed.nonzero().flatten().tolist()


def perturbed(grid: int) -> tuple[Tensor, Tensor]:
    images = torch.randn(1, 1, grid, grid, dtype=torch.float64)
    other = images.clone()
    other[..., 0] += 1
    return images, other


@pytest.mark.parametrize("pad_keys", ["mask", "attend"])
@pytest.mark.parametrize("style", ["v1", "v2", "swin_moe"])
@pytest.mark.parametrize("grid", [16, 17, 18, 19])
@torch.no_grad()
def test_column_0_reaches_its_window_and_the_next_and_nothing_else(grid: int, style: str, pad_keys: str) -> None:
    model = one_shifted_stage(style, grid, pad_keys=pad_keys)
    before, after = (model.encode(images)[0][0].permute(1, 2, 0) for images in perturbed(grid))
    # One block mixes columns 0-3, the shifted one carries columns 2-3 into the window of columns 2-5: exactly that.
    assert reach(before, after) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("grid", "leaks"), [(16, False), (17, True), (18, False), (19, True)])
@torch.no_grad()
def test_timm_pads_after_the_shift_and_leaks_on_grids_17_and_19(grid: int, leaks: bool) -> None:
    """timm #2438. When this fails, timm was mended: drop it, and compare with timm on every grid in the parity test."""
    from timm.models.swin_transformer import SwinTransformer as TimmV1

    model = one_shifted_stage("v1", grid)
    cfg = model.config
    twin = TimmV1(
        img_size=grid, patch_size=1, in_chans=1, num_classes=2, embed_dim=8, depths=(2,), num_heads=(2,), window_size=4
    )
    twin = twin.double().eval()
    twin.load_state_dict(to_timm(model.state_dict()))
    assert cfg.window_size == (WINDOW, WINDOW)
    stage = twin.layers[0]
    before, after = (stage(twin.patch_embed(images))[0] for images in perturbed(grid))
    far = [column for column in reach(before, after) if column > 5]
    assert bool(far) == leaks, far
