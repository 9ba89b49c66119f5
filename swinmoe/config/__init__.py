"""Frozen, strict configuration: what a model, a run and a comparison are."""

from swinmoe.config.finetune import FinetuneConfig, UpcycleConfig
from swinmoe.config.model import STYLES, ModelConfig, StyleConfig, resolve_style
from swinmoe.config.moe import (
    AdaptConfig,
    BalanceLossConfig,
    CapacityConfig,
    CapacityPolicy,
    ExpertConfig,
    LayerCapacity,
    MoEConfig,
    RouterConfig,
)
from swinmoe.config.run import (
    AugmentConfig,
    CheckpointConfig,
    CompareConfig,
    DataConfig,
    LogConfig,
    MixupConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "STYLES",
    "AdaptConfig",
    "AugmentConfig",
    "BalanceLossConfig",
    "CapacityConfig",
    "CapacityPolicy",
    "CheckpointConfig",
    "CompareConfig",
    "DataConfig",
    "ExpertConfig",
    "FinetuneConfig",
    "LayerCapacity",
    "LogConfig",
    "MixupConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RouterConfig",
    "RunConfig",
    "ScheduleConfig",
    "StyleConfig",
    "TrainConfig",
    "UpcycleConfig",
    "resolve_style",
]
