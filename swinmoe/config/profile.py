"""What `swinmoe profile` measures: one workload, or every combination of several values of its fields."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any, Literal

from swinmoe.config.checks import at_least, check_folder_name, check_ranges
from swinmoe.config.moe import CapacityConfig, CapacityPolicy, MoEConfig
from swinmoe.config.run import ParallelConfig
from swinmoe.errors import ConfigError

Skew = float | Literal["router"]
Exchange = Literal["flat", "2dh"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class LayerWorkload:
    """One expert layer and the tokens that it gets."""

    tokens: int = 2304
    """Of each rank."""
    dim: int = 384
    hidden: int = 1536
    """Hidden width of one expert."""
    experts: int = 8
    top_k: int = 1
    capacity: str = "dropless"
    """`dropless`, or the kind and the factor: `fixed 1.25`, `bounded 2`; a number alone is a fixed factor."""
    dispatcher: str = "ragged"
    ep_size: int = 1
    weight_group: int = 1
    exchange: Exchange = "flat"
    local_size: int | None = None
    chunks: int = 1
    payload: Literal["full", "bf16"] = "full"
    skew: Skew = "router"
    """`router`: tokens go where a router with random weights sends random tokens. A number s: expert e gets a share
    proportional to 1/(e + 1)^s (Zipf's law), 0 being balance."""
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        positive = at_least(1)
        check_ranges(
            self,
            "profile",
            tokens=positive,
            dim=positive,
            hidden=positive,
            skew=at_least(0, "use 0 for balance, router for the router's own choice"),
        )
        object.__setattr__(self, "capacity", _capacity_named(self.capacity))
        self.moe()
        self.parallel().check_experts(self.experts, "experts")

    def policy(self) -> CapacityPolicy:
        """The capacity policy that `capacity` describes."""
        kind, _, factor = self.capacity.partition(" ")
        if kind == "dropless":
            return CapacityPolicy()
        return CapacityPolicy(kind="fixed" if kind == "fixed" else "bounded", factor=float(factor))

    def moe(self) -> MoEConfig:
        """The layer."""
        return MoEConfig(
            num_experts=self.experts,
            top_k=self.top_k,
            dispatcher=self.dispatcher,
            capacity=CapacityConfig(train=self.policy(), eval=self.policy()),
        )

    def parallel(self) -> ParallelConfig:
        """How it is spread."""
        return ParallelConfig(
            ep_size=self.ep_size,
            weight_group=self.weight_group,
            exchange=self.exchange,
            local_size=self.local_size,
            chunks=self.chunks,
            payload=self.payload,
        )


def _capacity_named(given: str) -> str:
    """`1.25` and `fixed 1.25` as `fixed 1.25`."""
    words = given.replace(":", " ").split()
    if words == ["dropless"]:
        return "dropless"
    kind, factor = words if len(words) == 2 else ("fixed", given)
    try:
        number = float(factor)
    except ValueError:
        number = -1.0
    if kind not in ("fixed", "bounded") or number <= 0:
        raise ConfigError(f"capacity {given!r} is not possible; use dropless, a factor as 1.25, or e.g. 'bounded 2'")
    return f"{kind} {number:g}"


@dataclass(frozen=True, kw_only=True)
class LayerSweepConfig:
    """`swinmoe profile layer`: all combinations of the values of a `LayerWorkload`'s fields; its fields say more."""

    name: str = "profile_layer"
    what: Literal["layer"] = "layer"
    output_dir: str = "runs"
    tokens: tuple[int, ...] = (2304,)
    dim: tuple[int, ...] = (384,)
    hidden: tuple[int, ...] = (1536,)
    experts: tuple[int, ...] = (8,)
    top_k: tuple[int, ...] = (1,)
    capacity: tuple[str, ...] = ("dropless",)
    dispatcher: tuple[str, ...] = ("ragged",)
    ep_size: tuple[int, ...] = (1,)
    weight_group: tuple[int, ...] = (1,)
    exchange: tuple[Exchange, ...] = ("flat",)
    local_size: tuple[int | None, ...] = (None,)
    chunks: tuple[int, ...] = (1,)
    payload: tuple[Literal["full", "bf16"], ...] = ("full",)
    skew: tuple[Skew, ...] = ("router",)
    precision: tuple[Precision, ...] = ("fp32",)
    backward: bool = True
    """Training steps; false: inference."""
    rounds: int = 15
    threads: int | None = None
    """CPU threads of each process; null = as torch has it."""
    seed: int = 0

    def __post_init__(self) -> None:
        _check_profile(self)
        for name in self.axes():
            if not getattr(self, name):
                raise ConfigError(f"profile.{name} is an empty list; give at least one value")

    @staticmethod
    def axes() -> list[str]:
        """The fields that may have several values."""
        return [f.name for f in fields(LayerWorkload)]

    def workloads(self) -> tuple[list[LayerWorkload], list[str]]:
        """All combinations that can be, and what is wrong with the others.

        Raises:
            ConfigError: none can be.
        """
        names = self.axes()
        found: list[LayerWorkload] = []
        refused: list[str] = []
        for values in product(*(getattr(self, name) for name in names)):
            try:
                found.append(LayerWorkload(**dict(zip(names, values, strict=True))))
            except ConfigError as error:
                refused.append(str(error))
        if not found:
            raise ConfigError(refused[0])
        return list(dict.fromkeys(found)), list(dict.fromkeys(refused))


@dataclass(frozen=True, kw_only=True)
class ModelSweepConfig:
    """`swinmoe profile model`: the steps of a run, for all combinations of some of its settings."""

    name: str = "profile_model"
    what: Literal["model"] = "model"
    output_dir: str = "runs"
    run: str
    """The run's config file."""
    set: dict[str, Any] = field(default_factory=dict)
    """Keys of the run, as `key.of.run: value`."""
    vary: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """The same with several values each."""
    backward: bool = True
    """Training steps, optimiser with them; false: inference."""
    rounds: int = 15
    threads: int | None = None

    def __post_init__(self) -> None:
        _check_profile(self)
        for key, values in self.vary.items():
            if not values:
                raise ConfigError(f"profile.vary.{key} is an empty list; give at least one value")


def _check_profile(config: LayerSweepConfig | ModelSweepConfig) -> None:
    check_folder_name("name", config.name, "; the folder above it is output_dir")
    check_ranges(
        config,
        "profile",
        rounds=at_least(1, "six or more give a 95 % interval"),
        threads=at_least(1, "use null to leave them as they are"),
    )


def listed(tree: dict[str, Any]) -> dict[str, Any]:
    """A `LayerSweepConfig`'s tree with single values made lists of one, and capacity factors made text."""
    axes = LayerSweepConfig.axes()
    lists = {key: value if isinstance(value, list) else [value] for key, value in tree.items() if key in axes}
    if "capacity" in lists:
        lists["capacity"] = [str(value) for value in lists["capacity"]]
    return {**tree, **lists}
