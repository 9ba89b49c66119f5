"""From a comparison's config to its arms, and from what they are matched on to how long each trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from swinmoe.config import CompareConfig, RunConfig
from swinmoe.config.io import build, merge
from swinmoe.errors import ConfigError
from swinmoe.models.counts import count
from swinmoe.train import Length, planned_steps

ACTIVE_TOLERANCE = 0.01
"""Arms matched on active parameters may differ by this share."""
OWN_KEYS = ("name", "seed", "output_dir", "resume")
"""Run keys that the comparison sets itself."""


def resolve_arms(config: CompareConfig, seed: int) -> dict[str, RunConfig]:
    """Each arm's full run config for one seed.

    Raises:
        ConfigError: an arm changes what all arms must share (data, batch, precision), or sets a key of the comparison.
    """
    runs: dict[str, RunConfig] = {}
    for name, over in config.arms.items():
        tree = merge(config.base, over)
        for key in OWN_KEYS:
            if key in tree:
                raise ConfigError(f"compare arm {name!r} sets {key!r}, which the comparison sets itself; remove it")
        tree |= {"name": config.name, "seed": seed, "output_dir": config.output_dir, "resume": config.resume}
        runs[name] = build(RunConfig, tree)
    first_name, first = next(iter(runs.items()))
    for name, run in runs.items():
        for what, mine, theirs in (
            ("data", run.data, first.data),
            ("parallel", run.parallel, first.parallel),
            ("log", run.log, first.log),
            ("checkpoint", run.checkpoint, first.checkpoint),
            *(
                (f"train.{k}", getattr(run.train, k), getattr(first.train, k))
                for k in (
                    "batch_size",
                    "accumulation",
                    "precision",
                    "tf32",
                    "label_smoothing",
                    "eval_batch_size",
                    "eval_every_epochs",
                )
            ),
        ):
            if mine != theirs:
                raise ConfigError(
                    f"arms {first_name!r} and {name!r} differ in {what!r} ({theirs} and {mine}); arms see the same "
                    "batches, so set it once under base"
                )
    return runs


def match_lengths(config: CompareConfig, runs: Mapping[str, RunConfig], steps_per_epoch: int) -> dict[str, Length]:
    """How long each arm trains, by what the comparison matches.

    `steps`: the planned optimiser steps. `flops`: as many whole steps as fit into the reference arm's training FLOPs,
    router counted. `active_params`: as `steps`, arms that differ by more than 1 % refused. `seconds`: own step time.
    """
    if config.match == "seconds":
        return {name: Length(seconds=config.budget_seconds) for name in runs}
    planned = {name: planned_steps(run.train, steps_per_epoch) for name, run in runs.items()}
    counts = {name: count(run.model) for name, run in runs.items()}
    reference = reference_arm(config)
    if config.match == "active_params":
        base = counts[reference].active
        for name, found in counts.items():
            share = found.active / base - 1
            if abs(share) > ACTIVE_TOLERANCE:
                raise ConfigError(
                    f"match: active_params, but arm {name!r} has {found.active:,} active parameters and {reference!r} "
                    f"{base:,} ({100 * share:+.1f} %); bring them within 1 %, for instance by moe.experts.hidden_ratio"
                )
    if config.match == "flops":
        cost = {n: counts[n].step_flops(run.train.batch_size, run.train.accumulation) for n, run in runs.items()}
        budget = planned[reference] * cost[reference]
        planned = {name: budget // own for name, own in cost.items()}
        for name, steps in planned.items():
            if steps == 0:
                raise ConfigError(
                    f"match: flops leaves arm {name!r} without a step: one costs {cost[name]:.3g} FLOPs, {reference!r} "
                    f"has {budget:.3g} in all; train the reference arm longer, or make {name!r} cheaper"
                )
    elif len(set(planned.values())) > 1:
        raise ConfigError(
            f"match: {config.match} means equal steps, but the arms plan {planned}; set train.epochs or train.steps "
            "once under base, or use match: flops"
        )
    return {name: Length(steps=steps) for name, steps in planned.items()}


def reference_arm(config: CompareConfig) -> str:
    """The arm that others are held against."""
    return config.reference or next(iter(config.arms))


def shared_run(runs: Mapping[str, RunConfig]) -> RunConfig:
    """The run config whose data, batch, logging and checkpoint settings hold for all arms."""
    return replace(next(iter(runs.values())))
