"""Run records as a handful of numbers: per arm, and between each arm and the reference."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swinmoe.report.interval import Estimate, estimate
from swinmoe.report.series import (
    Line,
    arm_names,
    evaluated_split,
    evaluations,
    images_per_second,
    last,
    late_loss,
    seeds_of,
    select,
)


@dataclass(frozen=True)
class Progress:
    """How far one arm got with one seed."""

    arm: str
    seed: int
    steps: int
    planned: int | None
    reason: str | None
    """Why it stopped; None: it has not finished."""

    @property
    def finished(self) -> bool:
        return self.reason is not None


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its seeds. Estimates run over the finished seeds, or over all of them while none has finished."""

    name: str
    seeds: tuple[int, ...]
    """Seeds behind the estimates."""
    params_total: int | None
    params_active: int | None
    """Parameters that one token meets."""
    flops_per_image: float | None
    """Forward, router counted, 2 per multiply-add."""
    train_flops_per_image: float | None
    moe_layers: tuple[str, ...]
    num_experts: int | None
    top_k: int | None
    steps: Estimate | None
    flops: Estimate | None
    """Training FLOPs spent."""
    seconds: Estimate | None
    """Step time spent."""
    images_per_second: Estimate | None
    """Per seed the median over logged intervals."""
    loss: Estimate | None
    """Training loss over the last tenth of the steps."""
    accuracy: Estimate | None
    """Final held-out accuracy, 0 to 1."""

    @property
    def sparse(self) -> bool:
        return bool(self.moe_layers)


@dataclass(frozen=True)
class Difference:
    """An arm against the reference. Loss, accuracy and speed are paired over the seeds that both have."""

    arm: str
    reference: str
    seeds: tuple[int, ...]
    loss: Estimate | None
    """Arm minus reference."""
    accuracy: Estimate | None
    """Arm minus reference, 0 to 1."""
    loss_means: tuple[float, float] | None
    """Arm and reference, each over the paired seeds; likewise for accuracy."""
    accuracy_means: tuple[float, float] | None
    speed: Estimate | None
    """Images per second, arm over reference."""
    params_total: float | None
    """Ratios, arm over reference, from here on."""
    params_active: float | None
    flops_per_image: float | None
    steps: float | None
    flops: float | None
    seconds: float | None

    @property
    def time_per_image(self) -> float | None:
        return 1 / self.speed.mean if self.speed else None


@dataclass(frozen=True)
class Summary:
    """All numbers of a report's first screen."""

    name: str
    command: str
    match: str | None
    """On what the arms were matched; None for a single training run."""
    reference: str | None
    arms: tuple[ArmSummary, ...]
    differences: tuple[Difference, ...]
    """One per arm other than the reference."""
    progress: tuple[Progress, ...]
    """One per arm and seed, those that have not begun included."""
    split: str
    """The data that accuracy is measured on, as the records name it."""

    @property
    def finished(self) -> bool:
        return bool(self.progress) and all(p.finished for p in self.progress)

    def arm(self, name: str) -> ArmSummary:
        return next(arm for arm in self.arms if arm.name == name)


def summary(records: Sequence[Line]) -> Summary:
    """The numbers of `records` (as `read_records` returns them: superseded lines are gone).

    Tolerant: a missing record makes its number None, never an error.
    """
    run = next((line for line in reversed(records) if line["kind"] == "run"), {})
    config = run.get("config") or {}
    names = arm_names(records)
    reference = config.get("reference") if config.get("reference") in names else None
    reference = reference or (names[0] if names else None)
    progress = _progress(records, config)
    runs = {(p.arm, p.seed): _numbers(records, p) for p in progress if p.steps or p.finished}
    counted = {name: _counted(progress, name) for name in names}
    arms = tuple(_arm(records, name, counted[name], runs) for name in names)
    return Summary(
        name=str(run.get("name") or config.get("name") or "run"),
        command=str(run.get("command") or ("compare" if len(names) > 1 else "train")),
        match=config.get("match") if len(names) > 1 else None,
        reference=reference,
        arms=arms,
        differences=tuple(
            _difference(arm, ref, runs) for ref in arms if ref.name == reference for arm in arms if arm is not ref
        ),
        progress=progress,
        split=evaluated_split(records),
    )


def _progress(records: Sequence[Line], config: Mapping[str, Any]) -> tuple[Progress, ...]:
    out = []
    for arm in dict.fromkeys([*arm_names(records), *(config.get("arms") or {})]):
        planned_seeds = config.get("seeds") if arm in (config.get("arms") or {}) else None
        for seed in sorted({*seeds_of(records, arm), *(planned_seeds or [])}):
            final = last(records, "final", arm, seed)
            step = final.get("step") or last(records, "step", arm, seed).get("step") or 0
            planned = last(records, "arm", arm, seed).get("steps")
            reason = str(final.get("reason") or "finished") if final else None
            out.append(Progress(arm, seed, int(step), planned, reason))
    return tuple(out)


def _counted(progress: Sequence[Progress], arm: str) -> tuple[int, ...]:
    """A half-trained seed must not be averaged with whole ones; while there are no whole ones, all are shown."""
    begun = [p for p in progress if p.arm == arm and (p.steps or p.finished)]
    return tuple(p.seed for p in ([p for p in begun if p.finished] or begun))


def _numbers(records: Sequence[Line], run: Progress) -> dict[str, float | None]:
    """The numbers of one arm and seed: those of its `final` line, else of its newest steps and evaluation."""
    steps = select(records, "step", run.arm, run.seed)
    final = last(records, "final", run.arm, run.seed)
    evals = evaluations(records, run.arm, run.seed)

    def newest(lines: Sequence[Line], key: str) -> float | None:
        return next((x[key] for x in reversed(lines) if x.get(key) is not None), None)

    return {
        "steps": run.steps or None,
        "loss": final["loss"] if final.get("loss") is not None else late_loss(steps),
        "accuracy": newest([*evals, final], "accuracy"),
        "flops": newest(steps, "flops"),
        "seconds": newest(steps, "seconds"),
        "images_per_second": images_per_second(steps),
    }


Runs = Mapping[tuple[str, int], Mapping[str, float | None]]


def _arm(records: Sequence[Line], name: str, seeds: tuple[int, ...], runs: Runs) -> ArmSummary:
    about = next((x for x in reversed(records) if x["kind"] == "arm" and x.get("arm") == name), {})

    def over_seeds(key: str) -> Estimate | None:
        return estimate([v for seed in seeds if (v := runs[name, seed][key]) is not None])

    return ArmSummary(
        name=name,
        seeds=seeds,
        params_total=about.get("params_total"),
        params_active=about.get("params_active"),
        flops_per_image=about.get("flops_per_image"),
        train_flops_per_image=about.get("train_flops_per_image"),
        moe_layers=tuple(about.get("moe_layers") or ()),
        num_experts=about.get("num_experts"),
        top_k=about.get("top_k"),
        steps=over_seeds("steps"),
        flops=over_seeds("flops"),
        seconds=over_seeds("seconds"),
        images_per_second=over_seeds("images_per_second"),
        loss=over_seeds("loss"),
        accuracy=over_seeds("accuracy"),
    )


def _difference(arm: ArmSummary, ref: ArmSummary, runs: Runs) -> Difference:
    seeds = tuple(seed for seed in arm.seeds if seed in ref.seeds)

    def pairs(key: str) -> list[tuple[float, float]]:
        both = [(runs[arm.name, s][key], runs[ref.name, s][key]) for s in seeds]
        return [(a, b) for a, b in both if a is not None and b is not None]

    def paired(key: str, combine: Callable[[float, float], float]) -> Estimate | None:
        return estimate([combine(a, b) for a, b in pairs(key)])

    def means(key: str) -> tuple[float, float] | None:
        both = pairs(key)
        return (statistics.fmean(a for a, _ in both), statistics.fmean(b for _, b in both)) if both else None

    def over(ours: float | None, theirs: float | None) -> float | None:
        return ours / theirs if ours is not None and theirs else None

    def over_runs(key: str) -> float | None:
        found = paired(key, lambda a, b: a / b if b else 1.0)
        return statistics.fmean(found.values) if found else None

    return Difference(
        arm=arm.name,
        reference=ref.name,
        seeds=seeds,
        loss=paired("loss", lambda a, b: a - b),
        accuracy=paired("accuracy", lambda a, b: a - b),
        loss_means=means("loss"),
        accuracy_means=means("accuracy"),
        speed=paired("images_per_second", lambda a, b: a / b),
        params_total=over(arm.params_total, ref.params_total),
        params_active=over(arm.params_active, ref.params_active),
        flops_per_image=over(arm.flops_per_image, ref.flops_per_image),
        steps=over_runs("steps"),
        flops=over_runs("flops"),
        seconds=over_runs("seconds"),
    )
