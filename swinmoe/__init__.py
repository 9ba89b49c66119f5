"""swinmoe: Mixture-of-Experts scaling for vision. Names are loaded on first use, so that `swinmoe --help` is quick."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from swinmoe.version import __version__

if TYPE_CHECKING:
    from swinmoe.checkpoint.experts_edit import grow_experts, keep_experts, prune_experts
    from swinmoe.checkpoint.experts_merge import merge_experts
    from swinmoe.checkpoint.load import load_pretrained
    from swinmoe.checkpoint.load_report import LoadReport
    from swinmoe.checkpoint.pretrained import from_pretrained, save_pretrained
    from swinmoe.checkpoint.sparsify import collect_routing, sparsify
    from swinmoe.checkpoint.upcycle import Upcycling, upcycle
    from swinmoe.checkpoint.usage import measure_usage
    from swinmoe.config import ModelConfig, MoEConfig, RunConfig
    from swinmoe.models import SwinOutput, SwinTransformer, build_model, create_model
    from swinmoe.models.counts import ModelCounts, count
    from swinmoe.moe import MoEMlp, RoutingStats, register_dispatcher, register_expert, register_router
    from swinmoe.moe.from_tutel import from_tutel
    from swinmoe.timm_registry import register_with_timm

__all__ = [
    "LoadReport",
    "MoEConfig",
    "MoEMlp",
    "ModelConfig",
    "ModelCounts",
    "RoutingStats",
    "RunConfig",
    "SwinOutput",
    "SwinTransformer",
    "Upcycling",
    "__version__",
    "build_model",
    "collect_routing",
    "count",
    "create_model",
    "from_pretrained",
    "from_tutel",
    "grow_experts",
    "keep_experts",
    "load_pretrained",
    "measure_usage",
    "merge_experts",
    "prune_experts",
    "register_dispatcher",
    "register_expert",
    "register_router",
    "register_with_timm",
    "save_pretrained",
    "sparsify",
    "upcycle",
]

_HOMES = {
    "swinmoe.checkpoint.load": ("load_pretrained",),
    "swinmoe.checkpoint.load_report": ("LoadReport",),
    "swinmoe.checkpoint.pretrained": ("from_pretrained", "save_pretrained"),
    "swinmoe.checkpoint.experts_edit": ("grow_experts", "keep_experts", "prune_experts"),
    "swinmoe.checkpoint.experts_merge": ("merge_experts",),
    "swinmoe.checkpoint.sparsify": ("collect_routing", "sparsify"),
    "swinmoe.checkpoint.upcycle": ("Upcycling", "upcycle"),
    "swinmoe.checkpoint.usage": ("measure_usage",),
    "swinmoe.config": ("MoEConfig", "ModelConfig", "RunConfig"),
    "swinmoe.models": ("SwinOutput", "SwinTransformer", "build_model", "create_model"),
    "swinmoe.models.counts": ("ModelCounts", "count"),
    "swinmoe.moe": ("MoEMlp", "RoutingStats", "register_dispatcher", "register_expert", "register_router"),
    "swinmoe.moe.from_tutel": ("from_tutel",),
    "swinmoe.timm_registry": ("register_with_timm",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'swinmoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


class _RegisterAfterTimm:
    """An import hook: when timm is first imported, our presets join its registry. Until then it costs nothing."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                __getattr__("register_with_timm")()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # of this one loader object
        return spec


if "timm" in sys.modules:
    __getattr__("register_with_timm")()
elif not any(type(finder).__name__ == _RegisterAfterTimm.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _RegisterAfterTimm())
