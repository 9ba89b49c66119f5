"""swinmoe's presets in timm's registry, for people whose scripts call `timm.create_model`.

    import timm, swinmoe.timm_registry
    swinmoe.timm_registry.register_with_timm()
    model = timm.create_model("swinmoe_swin_v2_t_256_w8", num_classes=10)   # model(x) are logits, as of any timm model

timm is imported by `register_with_timm` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from swinmoe.config.presets import PRESETS
from swinmoe.errors import BackendUnavailableError, ConfigError
from swinmoe.models import SwinOutput, SwinTransformer
from swinmoe.models.build import preset_config

PREFIX = "swinmoe_"
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_GREY = {"mean": (0.5,), "std": (0.5,)}


class TimmSwin(SwinTransformer):
    """A `SwinTransformer` whose forward returns logits alone, as timm's scripts expect. Parameter names are the same.

    A script that trains experts must add their auxiliary loss: call `forward_output` and use its `aux_loss`.
    """

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]  # timm's contract, not SwinTransformer's
        """(B, C, Y, X) -> (B, num_classes)."""
        return self.forward_output(images).logits

    def forward_output(self, images: Tensor) -> SwinOutput:
        """(B, C, Y, X) -> everything that `SwinTransformer.forward` returns."""
        return super().forward(images)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, Y, X) -> the normed last map, (B, H, W, D) as of timm's own Swin."""
        x: Tensor = self.norm(self.encode(images)[-1].permute(0, 2, 3, 1))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, H, W, D) -> logits, or with `pre_logits` the pooled features."""
        x = x.mean((1, 2))
        return x if pre_logits else self.head(x)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What `timm.data.resolve_model_data_config` asks for."""
        cfg = self.config
        colours = _IMAGENET if cfg.in_chans == 3 else _GREY
        size = (cfg.in_chans, *cfg.img_size)
        return {"architecture": PREFIX + cfg.preset, "input_size": size, "num_classes": cfg.num_classes, **colours}

    @property
    def default_cfg(self) -> dict[str, Any]:
        return self.pretrained_cfg


def register_with_timm() -> list[str]:
    """Register every preset as `swinmoe_<preset>`; returns the names. A second call changes nothing.

    Raises:
        BackendUnavailableError: timm is not installed.
    """
    try:
        from timm.models import is_model, register_model
    except ImportError as error:
        raise BackendUnavailableError(
            "timm is not installed, so there is no registry to enter; install timm, or use swinmoe.models.create_model"
        ) from error
    names = [PREFIX + preset for preset in PRESETS]
    for name in names:
        if not is_model(name):
            register_model(_entrypoint(name))
    return names


def _entrypoint(name: str) -> Callable[..., TimmSwin]:
    """A function of timm's shape: (pretrained, **kwargs) -> model."""

    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> TimmSwin:
        if pretrained:
            raise ConfigError(f"{name} has no weights to download; use pretrained=False and load a checkpoint")
        with torch.device(device) if device is not None else nullcontext():
            model = TimmSwin(preset_config(name.removeprefix(PREFIX), **overrides), seed)
        if dtype is not None:
            model = model.to(dtype=dtype)
            model.prepare_tables()
        return model

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    return create
