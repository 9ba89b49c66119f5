"""What a comparison shows, in plain sentences computed from its numbers, with noise called noise."""

from __future__ import annotations

from swinmoe.report.interval import Estimate
from swinmoe.report.summarise import ArmSummary, Difference, Summary
from swinmoe.report.wording import duration, number, ratio, scaled, signed, spread

EQUAL = 0.02
"""Ratios this close to one are called equal."""
_MATCHED = {
    "steps": "steps",
    "flops": "training FLOPs",
    "seconds": "training time",
    "active_params": "active parameters",
}


def headline(summary: Summary) -> str:
    """One paragraph for the top of the report and the command line's last words."""
    if not summary.arms:
        return "No arm has written a record yet."
    told = [compared(summary, d) for d in summary.differences] or [alone(summary.arms[0])]
    return " ".join([*([standing(summary)] if not summary.finished else []), *told])


def standing(summary: Summary) -> str:
    """Where an unfinished run stands."""
    where = [
        f"{p.arm} seed {p.seed}: {p.steps} of {p.planned or '?'} steps" for p in summary.progress if not p.finished
    ]
    shown = "; ".join(where[:4]) + (f"; and {len(where) - 4} more" if len(where) > 4 else "")
    return f"Unfinished ({shown}); the numbers so far:"


def alone(arm: ArmSummary) -> str:
    """A run without a twin."""
    size = f"{scaled(arm.params_total)} parameters"
    if arm.sparse and arm.params_active is not None:
        size += f", of which {scaled(arm.params_active)} meet any one token"
    parts = [f"{arm.name} ({size}; {scaled(arm.flops_per_image, 'FLOPs')} per image forward)"]
    if arm.loss is None:
        return f"{parts[0]} has logged no step yet."
    steps = f" after {round(arm.steps.mean):,} steps" if arm.steps else ""
    parts.append(f"reached a training loss of {spread(arm.loss, 3)}{steps}")
    if arm.accuracy is not None:
        parts.append(f"and {spread(arm.accuracy, 1, 100)} % test accuracy")
    if arm.seconds is not None:
        parts.append(f"in {duration(arm.seconds.mean)} of step time")
    return " ".join(parts) + f" ({_basis(len(arm.seeds), paired=False)}). There is no second arm to compare it with."


def compared(summary: Summary, d: Difference) -> str:
    """One arm against the reference."""
    arm, ref = summary.arm(d.arm), summary.arm(d.reference)
    sentences = [_size(summary, d, arm, ref)]
    outcome = [text for text in (_loss(d), _accuracy(d)) if text]
    ended = "ended" if summary.finished else "stands"
    if outcome:
        sentences.append(f"It {ended} with {' and '.join(outcome)}, {_basis(len(d.seeds), paired=True)}.")
    else:
        sentences.append("No seed has results of both arms yet.")
    if d.time_per_image is not None:
        sentences.append(f"It took {ratio(d.time_per_image)} the time per training image.")
    return " ".join(sentences)


def _size(summary: Summary, d: Difference, arm: ArmSummary, ref: ArmSummary) -> str:
    conditions = []
    if summary.match in _MATCHED:
        conditions.append(_condition(_MATCHED[summary.match], getattr(d, _field(summary.match))))
    if summary.match != "flops":
        conditions.append(_condition("active FLOPs per image", d.flops_per_image))
    known = [c for c in conditions if c]
    given = f"At {' and '.join(known)}, " if known else ""
    if d.params_total is None:
        return f"{given}{arm.name} is set against {ref.name}."
    sizes = f"{scaled(arm.params_total)} against {scaled(ref.params_total)}"
    if abs(d.params_total - 1) <= EQUAL:
        return f"{given}{arm.name} holds as many parameters as {ref.name} ({sizes})."
    return f"{given}{arm.name} holds {ratio(d.params_total)} the parameters of {ref.name} ({sizes})."


def _field(match: str) -> str:
    return "params_active" if match == "active_params" else match


def _condition(what: str, value: float | None) -> str:
    """`equal steps` only where the records bear it out."""
    if value is None:
        return ""
    return f"equal {what}" if abs(value - 1) <= EQUAL else f"{ratio(value)} the {what}"


def _loss(d: Difference) -> str:
    if d.loss is None or d.loss_means is None:
        return ""
    values = " vs ".join(number(mean, 3) for mean in d.loss_means)
    verdict = d.loss.verdict(higher_is_better=False)
    if verdict == "noise":
        return f"no clear difference in training loss ({values}, {spread(d.loss, 3, sign=True)})"
    if d.loss.mean == 0:
        return f"equal training loss ({values})"
    return f"{'lower' if d.loss.mean < 0 else 'higher'} training loss ({values})"


def _accuracy(d: Difference) -> str:
    if d.accuracy is None or d.accuracy_means is None:
        return ""
    values = " vs ".join(number(100 * mean, 1) for mean in d.accuracy_means) + " %"
    if d.accuracy.verdict(higher_is_better=True) == "noise":
        return f"no clear difference in accuracy ({values}, {_points(d.accuracy)})"
    return f"{_points(d.accuracy)} of accuracy ({values})"


def _points(value: Estimate) -> str:
    text = spread(value, 1, 100, sign=True) if value.half_width is not None else signed(100 * value.mean, 1)
    return f"{text} points"


def _basis(count: int, *, paired: bool) -> str:
    if count == 1:
        return "on a single seed, so no interval and no claim beyond it" if paired else "a single seed, so no interval"
    return f"mean ± 95 % t interval over {count} {'paired ' if paired else ''}seeds"
