"""What a comparison shows, in plain sentences computed from its numbers, with noise called noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Headline:
    """What stands at the top of the report and in the command line's last words."""

    status: str
    """Where an unfinished run stands; empty when all is done."""
    findings: tuple[str, ...]
    """One per comparison."""
    basis: str
    """What the intervals rest on; empty where there is no comparison."""

    @property
    def text(self) -> str:
        return " ".join(part for part in (self.status, *self.findings, self.basis) if part)


def headline(summary: Summary) -> Headline:
    """The sentences for a summary, whatever it holds."""
    if not summary.arms:
        return Headline("", ("No arm has written a record yet.",), "")
    findings = tuple(compared(summary, d) for d in summary.differences) or (alone(summary.arms[0], summary.split),)
    return Headline("" if summary.finished else standing(summary), findings, _basis(summary.differences))


def standing(summary: Summary) -> str:
    """Where an unfinished run stands."""
    going = [p for p in summary.progress if not p.finished]
    done = len(summary.progress) - len(going)
    where = [f"{p.arm} seed {p.seed} (step {p.steps}{f' of {p.planned}' if p.planned else ''})" for p in going]
    shown = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
    basis = "Only finished seeds count for an arm that has any." if done else "All numbers are those so far."
    return f"Unfinished: {done} of {len(summary.progress)} runs are done; still to go: {shown}. {basis}"


def alone(arm: ArmSummary, split: str) -> str:
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
        parts.append(f"and {spread(arm.accuracy, 1, 100)} % {split} accuracy")
    if arm.seconds is not None:
        parts.append(f"in {duration(arm.seconds.mean)} of step time")
    seeds = "single seed" if len(arm.seeds) == 1 else f"mean ± 95 % t interval over {len(arm.seeds)} seeds"
    return f"{' '.join(parts)} ({seeds}). There is no second arm to compare it with."


def compared(summary: Summary, d: Difference) -> str:
    """One arm against the reference."""
    arm, ref = summary.arm(d.arm), summary.arm(d.reference)
    sentences = [_size(summary, d, arm, ref)]
    outcome = [text for text in (_loss(d), _accuracy(d)) if text]
    ended = "ended" if summary.finished else "stands"
    if outcome:
        sentences.append(f"It {ended} with {' and '.join(outcome)}.")
    else:
        sentences.append("No seed has results of both arms yet.")
    if d.time_per_image is not None:
        sentences.append(f"It takes {ratio(d.time_per_image)} the time per training image.")
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
    if _equal(d.loss, 3):
        return f"equal training loss ({values})"
    if d.loss.verdict(higher_is_better=False) == "noise":
        return f"no clear difference in training loss ({values}, {spread(d.loss, 3, sign=True)})"
    return f"{'lower' if d.loss.mean < 0 else 'higher'} training loss ({values})"


def _accuracy(d: Difference) -> str:
    if d.accuracy is None or d.accuracy_means is None:
        return ""
    values = " vs ".join(number(100 * mean, 1) for mean in d.accuracy_means) + " %"
    if _equal(d.accuracy, 1, 100):
        return f"equal accuracy ({values})"
    if d.accuracy.verdict(higher_is_better=True) == "noise":
        return f"no clear difference in accuracy ({values}, {_points(d.accuracy)})"
    return f"{_points(d.accuracy)} of accuracy ({values})"


def _equal(difference: Estimate, digits: int, scale: float = 1.0) -> bool:
    """True if no seed shows a difference in the digits that are printed."""
    return all(round(value * scale, digits) == 0 for value in difference.values)


def _points(value: Estimate) -> str:
    text = spread(value, 1, 100, sign=True) if value.half_width is not None else signed(100 * value.mean, 1)
    return f"{text} points"


def _basis(differences: Sequence[Difference]) -> str:
    counts = {d.arm: len(d.seeds) for d in differences if d.loss or d.accuracy}
    if not counts:
        return ""
    distinct = set(counts.values())
    if distinct == {1}:
        return "This is a single seed: no interval, so no telling effect from chance."
    if len(distinct) == 1:
        return f"Means ± 95 % t intervals over {distinct.pop()} paired seeds."
    each = ", ".join(f"{arm}: {count}" for arm, count in counts.items())
    return f"Means ± 95 % t intervals over paired seeds ({each}); a single seed has no interval."
