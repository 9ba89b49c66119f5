"""What the capacity tuner leaves behind: a config with its factors, and records of every measurement."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from swinmoe.config import CapacityPolicy, RunConfig
from swinmoe.config.io import Tree, build, merge, to_tree
from swinmoe.profiling.tune.capacity import Tuning
from swinmoe.profiling.tune.loads import drop_fraction
from swinmoe.profiling.tune.passes import Seen, at_factor
from swinmoe.records import RunRecord
from swinmoe.train.opened import Opened

CURVE = tuple(round(0.05 * i, 2) for i in range(2, 61))
"""Factors at which the picture shows δ."""


def layer_policies(opened: Opened, tunings: Iterable[Tuning]) -> Tree:
    """`model.moe.capacity.layers` with what was recommended, on top of what the model has there."""
    moe = opened.run.model.moe
    assert moe is not None
    layers: Tree = {}
    for tuning in tunings:
        for name, factor in tuning.verdict.setting.factors.items():
            own = getattr(moe.capacity.of(name), tuning.mode)
            layers.setdefault(name, {})[tuning.mode] = _short(at_factor(own, factor))
    before = {
        name: {mode: _short(getattr(own, mode)) for mode in ("train", "eval") if getattr(own, mode) is not None}
        for name, own in (moe.capacity.layers or {}).items()
    }
    return merge(before, layers)


def tuned_config(opened: Opened, tunings: Iterable[Tuning]) -> Tree:
    """A whole run: that of the checkpoint (data and model as they were asked about), with the layers' capacities.

    `train`, `evaluate` and `finetune` accept it.
    """
    trained = opened.source.run
    tree = to_tree(opened.run if trained is None else trained)
    now = to_tree(opened.run)
    tree |= {"model": now["model"], "data": now["data"], "finetune": None, "resume": "never"}
    if opened.mesh.world > 1:
        tree["parallel"] = now["parallel"]  # factors hold for ranks that share experts and batches like these
    tree["name"] = f"{tree['name']}_tuned"
    tree["model"]["moe"]["capacity"]["layers"] = layer_policies(opened, tunings)
    build(RunConfig, tree)  # refused now rather than by whoever reads the file
    return tree


def as_yaml(tree: Tree, comment: Iterable[str] = ()) -> str:
    """`tree` as a config file that begins with comment lines."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment)
    return head + yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)


def write_records(records: RunRecord, tuning: Tuning) -> None:
    """A `measurement` per setting, `expert_loads` and a `drop_curve` per layer, and the `recommendation`."""
    for point in (*tuning.points, *tuning.layered):
        records.write(
            "measurement",
            what="capacity",
            name=f"{tuning.mode}: {point.name}",
            variant={
                "mode": tuning.mode,
                "capacity": point.name,
                "batch_prioritized": point.setting.batch_prioritized,
            },
            baseline=f"{tuning.mode}: dropless",
            factors=dict(point.setting.factors),
            ms=point.timing.as_json(),
            **_seen(point.seen),
        )
    for layer, loads in tuning.loads.items():
        records.write(
            "expert_loads",
            mode=tuning.mode,
            layer=layer,
            top_k=loads[0].top_k,
            tokens=[load.tokens for load in loads],
            routed=[load.routed for load in loads],
            expert_imbalance=tuning.expert_imbalance(layer),
            rank_imbalance=tuning.rank_imbalance(layer),
            ep_size=tuning.ep_size,
            together=tuning.together,
        )
        drops = [drop_fraction(loads, at_factor(tuning.own[layer], factor)) for factor in CURVE]
        records.write("drop_curve", mode=tuning.mode, layer=layer, factors=CURVE, drops=drops)
    verdict = tuning.verdict
    records.write(
        "recommendation",
        mode=tuning.mode,
        asked=str(tuning.asked),
        factors=dict(verdict.setting.factors),
        batch_prioritized=verdict.setting.batch_prioritized,
        separate=tuning.separate,
        chosen=_seen(verdict.chosen),
        checked=_seen(verdict.seen),
        dropless=_seen(verdict.reference),
        ms={name: timing.as_json() for name, timing in verdict.timings.items()},
        failures=verdict.failures,
    )


def _seen(seen: Seen) -> dict[str, Any]:
    return {
        "images": len(seen.correct),
        "batches": len(next(iter(seen.loads.values()))),
        "accuracy": seen.accuracy,
        "drop_fraction": seen.drop_fraction,
        "drops": seen.drops,
    }


def _short(policy: CapacityPolicy) -> Tree:
    """A policy without what its kind does not use."""
    tree = to_tree(policy)
    wanted = {"dropless": ("kind",), "adaptive": tuple(tree)}.get(policy.kind, ("kind", "factor", "min_slots"))
    return {key: tree[key] for key in wanted}
