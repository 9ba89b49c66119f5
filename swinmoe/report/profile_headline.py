"""What a profile shows, in plain sentences and a few large numbers, all computed from its records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from swinmoe.report.profile_data import Line, Measured, Profiles
from swinmoe.report.profile_plots import bytes_said
from swinmoe.report.wording import percent, ratio, scaled


@dataclass(frozen=True)
class Card:
    """One large number."""

    label: str
    value: str
    detail: str


def findings(found: Profiles) -> list[str]:
    """One sentence or two per kind of measurement."""
    said = [*_steps(found.of("layer", "model")), *_exchanges(found)]
    return said or ["Nothing has been measured yet."]


def cards(found: Profiles) -> list[Card]:
    """The numbers that people come for; those that were not measured are left out."""
    steps = [m for m in found.of("layer", "model") if not m.is_dense]
    return [
        *_ratio_card(steps),
        *_useful_card(steps),
        *_share_card("Padding waste, at most", steps, "padding_waste", "of the rows that experts compute"),
        *_share_card("Drop loss, at most", steps, "drop_loss", "of all choices meet no expert"),
        *_share_card("Imbalance tax, at most", steps, "imbalance_tax", "over the same step with balance forced"),
        *_share_card("Exposed communication, at most", steps, "exposed_share", "of the step waits for exchanges"),
        *_bandwidth_card(found),
    ]


def _steps(measured: Sequence[Measured]) -> Iterator[str]:
    compared = sorted((m for m in measured if m.ratio is not None), key=lambda m: m.ratio or 0.0)
    if not compared:
        return
    best, worst = compared[0], compared[-1]
    base = best.baseline
    assert base is not None
    noise = "" if best.told_apart else ", which noise alone could make"
    text = (
        f"{best.label} takes {ratio(best.ratio)} the time of {base.label} ({_ms(best)} against {_ms(base)}{noise})"
        if len(compared) == 1
        else f"Of {len(compared)} ways, {best.label} is the fastest over its dense baseline: {ratio(best.ratio)} the "
        f"time ({_ms(best)} against {_ms(base)}{noise}). The slowest is {worst.label}: {ratio(worst.ratio)}"
    )
    if best.useful is not None:
        text += f". The fastest's useful work runs at {percent(best.useful)} of a bare matrix product's rate"
    yield text + "."
    spread = [m for m in compared if m.exposed_share is not None]
    if spread:
        least = min(spread, key=lambda m: m.exposed_share or 0.0)
        most = max(spread, key=lambda m: m.exposed_share or 0.0)
        text = f"Where experts are spread, the step waits for exchanges {percent(least.exposed_share)} of its time"
        rest = f" ({least.label}) to {percent(most.exposed_share)} ({most.label})" if most is not least else ""
        yield f"{text}{rest}."


def _exchanges(found: Profiles) -> Iterator[str]:
    fit = _plain_fit(found)
    if fit is not None:
        rate, half = fit["bandwidth"], fit["half_bandwidth_bytes"]
        text = f"An exchange ({fit['name']}) takes {_time(fit['latency_seconds'])} however small"
        text += f" and sends {scaled(rate, 'B/s')} when large" if rate else "; sizes did not reach a bandwidth"
        text += f", half of that with messages of {bytes_said(half)}" if rate and half else ""
        typical, worst = percent(fit["typical_error"]), percent(fit["worst_error"])
        yield f"{text}; the fit is within {typical} of the times, {worst} at worst."
        return
    even = [m for m in found.of("exchange") if not m.variant.get("skew")]
    if even:
        best = max(even, key=lambda m: float(m.line["busbw"]))
        yield f"The fastest even exchange, {best.label}, moves {scaled(float(best.line['busbw']), 'B/s')}."


def _plain_fit(found: Profiles) -> Line | None:
    """Of the flat, whole, unrounded exchange of most ranks, forward."""
    plain = {"exchange": "flat", "chunks": 1, "payload": "full", "direction": "forward"}
    own = [
        fit
        for fit in found.fits
        if fit["variant"].get("ep_size") and all(fit["variant"].get(k) == v for k, v in plain.items())
    ]
    return max(own, key=lambda fit: int(fit["variant"]["ep_size"])) if own else None


def _ratio_card(steps: Sequence[Measured]) -> Iterator[Card]:
    compared = [m for m in steps if m.ratio is not None]
    if compared:
        best = min(compared, key=lambda m: m.ratio or 0.0)
        yield Card("Time over dense, at best", ratio(best.ratio), best.label)


def _useful_card(steps: Sequence[Measured]) -> Iterator[Card]:
    known = [m for m in steps if m.useful is not None]
    if known:
        best = max(known, key=lambda m: m.useful or 0.0)
        yield Card("Useful work, at best", percent(best.useful), f"of a bare matrix product's rate: {best.label}")


def _share_card(label: str, steps: Sequence[Measured], name: str, detail: str) -> Iterator[Card]:
    known = [(float(getattr(m, name)), m) for m in steps if getattr(m, name) is not None]
    if known:
        value, worst = max(known, key=lambda pair: pair[0])
        yield Card(label, percent(max(0.0, value)), f"{detail}: {worst.label}" if value > 0.005 else detail)


def _bandwidth_card(found: Profiles) -> Iterator[Card]:
    fit = _plain_fit(found)
    if fit is not None and fit["bandwidth"]:
        detail = f"{fit['name']}, large messages; latency {_time(fit['latency_seconds'])}"
        yield Card("Link", scaled(fit["bandwidth"], "B/s"), detail)


def _ms(m: Measured) -> str:
    return f"{m.ms:.4g} ms"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"
