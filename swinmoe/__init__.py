"""swinmoe: Mixture-of-Experts scaling for vision. Names are loaded on first use, so that `swinmoe --help` is quick."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from swinmoe.version import __version__

if TYPE_CHECKING:
    from swinmoe.config import ModelConfig, MoEConfig, RunConfig
    from swinmoe.models import SwinOutput, SwinTransformer, build_model, create_model
    from swinmoe.models.counts import ModelCounts, count
    from swinmoe.moe import MoEMlp, RoutingStats, register_dispatcher, register_expert, register_router
    from swinmoe.timm_registry import register_with_timm

__all__ = [
    "MoEConfig",
    "MoEMlp",
    "ModelConfig",
    "ModelCounts",
    "RoutingStats",
    "RunConfig",
    "SwinOutput",
    "SwinTransformer",
    "__version__",
    "build_model",
    "count",
    "create_model",
    "register_dispatcher",
    "register_expert",
    "register_router",
    "register_with_timm",
]

_HOMES = {
    "swinmoe.config": ("MoEConfig", "ModelConfig", "RunConfig"),
    "swinmoe.models": ("SwinOutput", "SwinTransformer", "build_model", "create_model"),
    "swinmoe.models.counts": ("ModelCounts", "count"),
    "swinmoe.moe": ("MoEMlp", "RoutingStats", "register_dispatcher", "register_expert", "register_router"),
    "swinmoe.timm_registry": ("register_with_timm",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'swinmoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


if "timm" in sys.modules:  # whoever uses timm finds our models in its registry; nobody else pays for importing it
    __getattr__("register_with_timm")()
