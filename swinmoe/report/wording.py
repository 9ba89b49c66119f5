"""Numbers as people read them."""

from __future__ import annotations

import math

from swinmoe.report.interval import Estimate

MINUS = "\u2212"
MISSING = "\u2013"
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def scaled(value: float | None, unit: str = "") -> str:
    """`12.3 MFLOPs` from 12_300_000 and `FLOPs`: three digits with an SI prefix."""
    if value is None:
        return MISSING
    factor, prefix = next(((f, p) for f, p in _PREFIXES if abs(value) >= f * 0.9995), (1.0, ""))
    return f"{_three_digits(value / factor)} {prefix}{unit}".rstrip()


def prefix_of(largest: float) -> tuple[float, str]:
    """Factor and SI prefix that suit an axis up to `largest`."""
    return next(((f, p) for f, p in _PREFIXES if largest >= f), (1.0, ""))


def duration_of(largest: float) -> tuple[float, str]:
    """Factor and unit that suit a time axis up to `largest` seconds."""
    return next(((f, u) for f, u in ((3600.0, "hours"), (60.0, "minutes")) if largest >= 3 * f), (1.0, "seconds"))


def duration(seconds: float | None) -> str:
    """`2.4 minutes`."""
    if seconds is None:
        return MISSING
    factor, unit = duration_of(seconds)
    return f"{_three_digits(seconds / factor)} {unit}"


def ratio(value: float | None) -> str:
    """`4.10×`, two digits after the point below ten."""
    if value is None:
        return MISSING
    return f"{value:.2f}×" if abs(value) < 10 else f"{value:.1f}×"


def percent(value: float | None) -> str:
    """`12 %` of a share; below one per cent a digit more."""
    if value is None:
        return MISSING
    return f"{number(100 * value, 1 if 0 < abs(value) < 0.0095 else 0)} %"


def number(value: float | None, digits: int) -> str:
    """A plain number with a true minus sign."""
    return MISSING if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float, digits: int) -> str:
    """With its sign always; a difference that rounds to zero has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def spread(value: Estimate | None, digits: int, scale: float = 1.0, *, sign: bool = False) -> str:
    """`80.1 ± 0.4`; a single seed has no ±. Digits grow until the half width shows one that is not zero."""
    if value is None:
        return MISSING
    mean, half = value.mean * scale, None if value.half_width is None else value.half_width * scale
    if half:
        digits = min(max(digits, math.ceil(-math.log10(half))), digits + 2)
    text = signed(mean, digits) if sign else number(mean, digits)
    return text if half is None else f"{text} ± {half:.{digits}f}"


def _three_digits(value: float) -> str:
    rounded = float(f"{value:.3g}")
    digits = 2 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:.{min(max(digits, 0), 3)}f}"
