"""What `swinmoe profile exchange` measures: one all-to-all, or every combination of several values of its settings."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, Literal

from swinmoe.config.checks import Range, at_least, check_folder_name, check_ranges
from swinmoe.config.profile import Exchange
from swinmoe.config.run import ParallelConfig
from swinmoe.errors import ConfigError

UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def parse_bytes(given: Any) -> int:
    """`64KiB`, `1.5 MB` or 4096 as bytes.

    Raises:
        ConfigError: no size, no such unit, or less than a byte.
    """
    found = _SIZE.fullmatch(str(given).strip())
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if found is None or found[2].lower() not in units or (size := round(float(found[1]) * units[found[2].lower()])) < 1:
        raise ConfigError(f"profile.bytes={given!r} is not a size; use bytes, or a unit as in 64KiB, 4MiB, 1.5MB")
    return size


@dataclass(frozen=True, kw_only=True)
class ExchangeWorkload:
    """One all-to-all of rows of fp32 numbers."""

    bytes: int = 2**16
    """What a rank has for each rank of its group, itself included: the mean, where `skew` is not 0."""
    skew: float = 0.0
    """This share of every rank's rows goes to the group's first rank, the rest evenly to all; 0 is an even exchange."""
    exchange: Exchange = "flat"
    local_size: int | None = None
    chunks: int = 1
    """Parts that are on their way at the same time."""
    payload: Literal["full", "bf16"] = "full"
    """`bf16`: rows are rounded before they travel, and are fp32 again afterwards."""
    ep_size: int | None = None
    """Ranks of a group; null = all there are."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "profile",
            bytes=at_least(1, "use e.g. 64KiB"),
            skew=Range(0, 1, advice="use 0 for an even exchange, 1 for everything to one rank"),
            ep_size=at_least(2, "use null for all processes; one alone has nobody to send to"),
        )
        if self.ep_size is not None or self.local_size is None:
            self.parallel(self.ep_size or 2)
        elif self.exchange != "2dh":
            raise ConfigError(f"profile.local_size={self.local_size} is for exchange=2dh; leave it out with flat")

    def parallel(self, world: int) -> ParallelConfig:
        """How its rows travel between `world` ranks.

        Raises:
            ConfigError: these settings do not fit together, or not with so many ranks.
        """
        return ParallelConfig(
            ep_size=self.ep_size or world,
            exchange=self.exchange,
            local_size=self.local_size,
            chunks=self.chunks,
            payload=self.payload,
        )


@dataclass(frozen=True, kw_only=True)
class ExchangeSweepConfig:
    """`swinmoe profile exchange`: all combinations of an `ExchangeWorkload`'s fields; its fields say more."""

    name: str = "profile_exchange"
    what: Literal["exchange"] = "exchange"
    output_dir: str = "runs"
    bytes: tuple[int, ...] = tuple(2**n for n in range(12, 25, 2))
    skew: tuple[float, ...] = (0.0,)
    exchange: tuple[Exchange, ...] = ("flat",)
    local_size: tuple[int | None, ...] = (None,)
    chunks: tuple[int, ...] = (1,)
    payload: tuple[Literal["full", "bf16"], ...] = ("full",)
    ep_size: tuple[int | None, ...] = (None,)
    dim: int = 256
    """Width of a row; messages are whole rows."""
    backward: bool = True
    """Also the way of the gradients."""
    rounds: int = 15
    threads: int | None = None
    """CPU threads of each process; null = as torch has it."""

    def __post_init__(self) -> None:
        check_folder_name("name", self.name, "; the folder above it is output_dir")
        check_ranges(
            self,
            "profile",
            dim=at_least(1),
            rounds=at_least(1, "six or more give a 95 % interval"),
            threads=at_least(1, "use null to leave them as they are"),
        )
        for name in self.axes():
            if not getattr(self, name):
                raise ConfigError(f"profile.{name} is an empty list; give at least one value")

    @staticmethod
    def axes() -> list[str]:
        """The fields that may have several values."""
        return [f.name for f in fields(ExchangeWorkload)]

    def workloads(self) -> tuple[list[ExchangeWorkload], list[str]]:
        """All combinations that can be, by rising size, and what is wrong with the others.

        Raises:
            ConfigError: none can be.
        """
        names = self.axes()
        found: list[ExchangeWorkload] = []
        refused: list[str] = []
        for values in product(*(getattr(self, name) for name in names)):
            try:
                found.append(ExchangeWorkload(**dict(zip(names, values, strict=True))))
            except ConfigError as error:
                refused.append(str(error))
        if not found:
            raise ConfigError(refused[0])
        return sorted(dict.fromkeys(found), key=lambda w: w.bytes), list(dict.fromkeys(refused))


def listed_exchange(tree: dict[str, Any]) -> dict[str, Any]:
    """An `ExchangeSweepConfig`'s tree with single values made lists of one, and sizes made numbers."""
    axes = ExchangeSweepConfig.axes()
    lists = {key: value if isinstance(value, list) else [value] for key, value in tree.items() if key in axes}
    if "bytes" in lists:
        lists["bytes"] = [parse_bytes(value) for value in lists["bytes"]]
    return {**tree, **lists}
