"""What an expert layer is: experts, router, capacity, losses. Placement in a backbone is `ModelConfig.moe_blocks`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from swinmoe.config.checks import above, at_least, below_one, check_ranges
from swinmoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens score experts.

    `noise` is the standard deviation of Gaussian gate noise *times E*: training logits get N(0, 1)·noise/E (V-MoE,
    Riquelme et al. 2021, §2; Swin-MoE uses 1.0). `normalize_gates` divides the K chosen gates by their sum.
    `bias_update_rate` > 0 turns on loss-free balancing (Wang et al. 2024): an expert bias enters the choice, never the
    gate, and moves by that rate against the sign of the load error once per optimiser step.
    """

    type: str = "linear"
    """`linear`, `cosine` (Chi et al. 2022, as in Swin-MoE), or a name registered with `register_router`."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize_gates: bool = False
    noise: float = 0.0
    batch_prioritized: bool = False
    """Batch-prioritised routing (V-MoE §4): slots go to tokens in order of their highest gate."""
    bias_update_rate: float = 0.0
    fp32: bool = True
    """Run the gate in float32 (or wider), under autocast too."""
    proj_dim: int = 256
    """Cosine router only: width of the space in which similarity is measured."""
    init_temperature: float = 0.5
    """Cosine router only: initial softmax temperature."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "moe.router",
            noise=at_least(0, "use 0 for none or 1.0 as Swin-MoE does"),
            bias_update_rate=at_least(0, "use 0 for none"),
            proj_dim=at_least(1),
            init_temperature=above(0),
        )


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """How an adaptive capacity follows the load. A layer's *need* in a batch is the least factor that drops no more
    than `max_drop` of the batch's choices.

    Every `every` steps the factor goes to (1 + margin) times the largest need of any rank since the last decision, held
    between floor and ceiling: up at once, down only from more than (1 + hysteresis) times that. A batch that needs more
    than the factor gives gets what it needs, ceiling or not: `max_drop` holds for every layer, rank and batch.
    """

    max_drop: float = 0.01
    """Share of a batch's choices that may find no slot; 0 = none."""
    floor: float = 0.5
    ceiling: float | None = None
    """Of the factor that stands between decisions; None = none."""
    margin: float = 0.05
    hysteresis: float = 0.1
    every: int = 10
    """Optimiser steps from one decision to the next."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "moe.capacity.adapt",
            max_drop=below_one("use 0 for no drops"),
            floor=at_least(0, "use 0 for none"),
            ceiling=above(0, "use null for none"),
            margin=at_least(0, "use 0 for none"),
            hysteresis=at_least(0, "use 0 to follow every change"),
            every=at_least(1),
        )
        if self.ceiling is not None and self.ceiling < self.floor:
            raise ConfigError(
                f"moe.capacity.adapt.ceiling={self.ceiling} is below its floor={self.floor}; raise the ceiling, or "
                "lower the floor"
            )

    def clamp(self, factor: float) -> float:
        """`factor` between floor and ceiling."""
        return min(max(factor, self.floor), math.inf if self.ceiling is None else self.ceiling)


@dataclass(frozen=True, kw_only=True)
class CapacityPolicy:
    """How many slots an expert has per source rank; C = max(min_slots, k·int(factor·ceil(T/E))) (Tutel's rounding).

    `fixed`: C always. `bounded`: as many as needed, at most C. `dropless`: as many as needed. `adaptive` (training):
    as many as needed, at most C, whose factor follows the load as `adapt` says; `factor` is the first one.
    """

    kind: Literal["fixed", "bounded", "dropless", "adaptive"] = "dropless"
    factor: float = 1.25
    min_slots: int = 1
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    """`adaptive` only."""

    def __post_init__(self) -> None:
        check_ranges(self, "moe.capacity", min_slots=at_least(0))
        if self.kind != "dropless" and self.factor <= 0:
            raise ConfigError(
                f"capacity factor {self.factor} must be positive for kind={self.kind!r}; "
                "for no limit use kind='dropless'"
            )


@dataclass(frozen=True, kw_only=True)
class LayerCapacity:
    """What one expert layer has instead of the model's policies."""

    train: CapacityPolicy | None = None
    """None = as the other layers."""
    eval: CapacityPolicy | None = None

    def __post_init__(self) -> None:
        _refuse_adaptive(self.eval)


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """Capacity while training and while evaluating."""

    train: CapacityPolicy = field(default_factory=CapacityPolicy)
    eval: CapacityPolicy = field(default_factory=CapacityPolicy)
    layers: dict[str, LayerCapacity] | None = None
    """Layers that have policies of their own, by name (`layers.2.blocks.1.mlp`); `swinmoe tune capacity` finds them.
    On a command line: `'model.moe.capacity.layers={layers.2.blocks.1.mlp: {eval: {kind: bounded, factor: 0.9}}}'`."""

    def __post_init__(self) -> None:
        _refuse_adaptive(self.eval)

    def of(self, layer: str) -> CapacityConfig:
        """The policies of one layer; those of all where it has none of its own."""
        own = (self.layers or {}).get(layer, LayerCapacity())
        return CapacityConfig(train=own.train or self.train, eval=own.eval or self.eval)


def _refuse_adaptive(policy: CapacityPolicy | None) -> None:
    if policy is not None and policy.kind == "adaptive":
        raise ConfigError(
            "moe.capacity.eval.kind=adaptive: a factor that follows the load is for training, since an image's result "
            "would depend on the images before it; use bounded with a factor that swinmoe tune capacity finds, or "
            "dropless"
        )


@dataclass(frozen=True, kw_only=True)
class BalanceLossConfig:
    """Weight of every auxiliary loss (0 = not computed). See `swinmoe.moe.losses` for the formulas."""

    gshard: float = 0.0
    """GShard/Switch loss: E·Σ_e mean(p_e)·mean(1[top-1 = e])."""
    importance: float = 0.0
    load: float = 0.0
    importance_load: float = 0.0
    """(importance + load)/2, logits on both sides of the load estimate (V-MoE appendix A)."""
    importance_load_tutel: float = 0.0
    """The literal Tutel form, which compares a probability with a logit; for reproducing Swin-MoE only."""
    z: float = 0.0
    """Router z-loss (ST-MoE, Zoph et al. 2022, eq. 5)."""
    over_layers: Literal["sum", "mean"] = "sum"
    """Swin-MoE sums the layers' losses."""
    batch: Literal["local", "global"] = "global"
    """Balance within each rank's batch, or within the global batch (same result for any number of processes)."""

    def __post_init__(self) -> None:
        weight = at_least(0, "a loss weight of 0 switches the loss off")
        names = ("gshard", "importance", "load", "importance_load", "importance_load_tutel", "z")
        check_ranges(self, "moe.losses", **dict.fromkeys(names, weight))

    @property
    def needs_noise(self) -> bool:
        """True if a chosen loss estimates load through the gate noise (and so needs `router.noise` > 0)."""
        return self.load > 0 or self.importance_load > 0 or self.importance_load_tutel > 0


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """What one expert computes."""

    type: str = "gelu"
    """`gelu`, `relu`, `swiglu`, or a name registered with `register_expert`."""
    hidden_ratio: float | None = None
    """Hidden width of an expert over that of the dense MLP it replaces; None = 1. Below 1: fine-grained experts."""
    dropout: float = 0.0
    """After the activation, inside the expert (Swin-MoE: 0.1)."""
    fc1_bias: bool = True
    fc2_bias: Literal["learned", "frozen-zero", "none"] = "learned"
    """`frozen-zero`: a parameter held at 0, as in Microsoft's Swin-MoE checkpoints."""

    def __post_init__(self) -> None:
        check_ranges(self, "moe.experts", dropout=below_one(), hidden_ratio=above(0, "use null for 1"))


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A top-k gated expert layer that stands where an MLP stood. Experts are counted globally, never per device."""

    num_experts: int = 8
    top_k: int = 1
    router: RouterConfig = field(default_factory=RouterConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    losses: BalanceLossConfig = field(default_factory=lambda: BalanceLossConfig(gshard=0.01))
    experts: ExpertConfig = field(default_factory=ExpertConfig)
    shared_expert_ratio: float = 0.0
    """Hidden width, over the dense MLP's, of one more expert that every token visits (0 = none)."""
    dispatcher: str = "ragged"
    """`ragged` (rows back to back, no padding), `padded` (static shapes), `tutel` (padded, by Tutel's kernels),
    `gshard` (padded, by dense masks: oracle and baseline), `auto` (one of the first three, and says which), or a
    registered name. All give the same numbers."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "moe",
            num_experts=at_least(1, "for a dense model use moe: null"),
            shared_expert_ratio=at_least(0, "use 0 for none"),
        )
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"moe.top_k={self.top_k} is not possible with moe.num_experts={self.num_experts}; "
                f"use 1 to {self.num_experts}"
            )
        if self.losses.needs_noise and self.router.noise == 0:
            raise ConfigError(
                "the load loss estimates load through the gate noise, but moe.router.noise=0; set "
                "moe.router.noise to 1.0 (Swin-MoE) or use moe.losses.gshard or moe.losses.importance instead"
            )
