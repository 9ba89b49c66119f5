"""Ranges of config fields: a number that cannot work is refused when the config is made, not hours later."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from swinmoe.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """An interval of the real line, with advice for those outside it. Infinities and NaN lie in none."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    advice: str = ""

    def __contains__(self, value: float) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return False
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def __str__(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return "a finite number"
        if math.isinf(self.high):
            return f"above {self.low:g}" if self.low_open else f"at least {self.low:g}"
        if math.isinf(self.low):
            return f"below {self.high:g}" if self.high_open else f"at most {self.high:g}"
        return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}{')' if self.high_open else ']'}"


FINITE = Range()


def at_least(low: float, advice: str = "") -> Range:
    """[low, ∞)"""
    return Range(low=low, advice=advice)


def above(low: float, advice: str = "") -> Range:
    """(low, ∞)"""
    return Range(low=low, low_open=True, advice=advice)


def at_most(high: float, advice: str = "") -> Range:
    """(-∞, high]"""
    return Range(high=high, advice=advice)


def probability(advice: str = "use 0 for never, 1 for always") -> Range:
    """[0, 1]"""
    return Range(0, 1, advice=advice)


def below_one(advice: str = "use 0 for none") -> Range:
    """[0, 1)"""
    return Range(0, 1, high_open=True, advice=advice)


def check_ranges(config: Any, where: str, **ranges: Range) -> None:
    """Every number of a dataclass lies in its field's range; one without a range is at least finite.

    None passes, and each number of a tuple is looked at. All mistakes are named at once, as `where.field`.

    Raises:
        ConfigError: key, value, what is allowed and what to do, a line each.
    """
    mistakes = []
    for field in fields(config):
        value, allowed = getattr(config, field.name), ranges.get(field.name, FINITE)
        wrong = next((number for number in _numbers(value) if number not in allowed), None)
        if wrong is not None:
            finite = "" if isinstance(wrong, int) or math.isfinite(wrong) or allowed is FINITE else " and finite"
            advice = f"; {allowed.advice}" if allowed.advice else ""
            mistakes.append(f"{where}.{field.name}={value} must be {allowed}{finite}{advice}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def divisors(n: int) -> list[int]:
    """What divides `n`, from 1 to `n`: the choices that an error offers."""
    return [d for d in range(1, n + 1) if n % d == 0]


def check_folder_name(key: str, name: str, advice: str = "") -> None:
    """`ConfigError` unless `name` can be one folder's name, so that no run lands beside or above its output folder."""
    if not name.strip() or name in (".", "..") or any(mark in name for mark in "/\\\0"):
        raise ConfigError(f"{key}={name!r} is not a plain folder name; use letters, digits, '-', '_' and '.'{advice}")


def _numbers(value: Any) -> list[float]:
    if isinstance(value, tuple | list):
        return [number for part in value for number in _numbers(part)]
    return [value] if isinstance(value, int | float) else []
