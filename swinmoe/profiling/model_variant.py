"""What tells one profiled run from others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from swinmoe.config import RunConfig
from swinmoe.parallel import Mesh

_SAID = {
    "model.embed_dim",
    "model.moe.dispatcher",
    "model.moe.num_experts",
    "model.moe.top_k",
    "parallel.chunks",
    "parallel.ep_size",
    "parallel.exchange",
    "parallel.local_size",
    "parallel.payload",
    "parallel.weight_group",
    "train.batch_size",
    "train.precision",
}
"""Settings of a run that a variant always has, under names of its own."""


def variant_of(run: RunConfig, mesh: Mesh, backward: bool, varied: Mapping[str, Any]) -> dict[str, Any]:
    """What tells this run from others, flat; of `varied` what is not said otherwise."""
    moe, policy = run.model.moe, None
    if moe is not None:
        policy = moe.capacity.train if backward else moe.capacity.eval
    capacity_said = None
    if policy is not None:
        capacity_said = policy.kind if policy.kind == "dropless" else f"{policy.kind} {policy.factor:g}"
    policy_said = f"model.moe.capacity.{'train' if backward else 'eval'}."
    said = _SAID | {policy_said + "kind", policy_said + "factor"}
    others = {
        key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for key, value in varied.items()
        if key not in said and not (moe is None and key.startswith("model.moe"))
    }
    return {
        "dispatcher": "dense" if moe is None else moe.dispatcher,
        "num_experts": moe.num_experts if moe else 0,
        "top_k": moe.top_k if moe else 1,
        "capacity": capacity_said,
        "world": mesh.world,
        "ep_size": mesh.ep_size,
        "weight_group": run.parallel.weight_group,
        "chunks": run.parallel.chunks,
        "exchange": run.parallel.exchange,
        "local_size": run.parallel.local_size,
        "payload": run.parallel.payload,
        "skew": "router",
        "batch_size": run.train.batch_size,
        "img_size": run.model.img_size[0],
        "embed_dim": run.model.embed_dim,
        "precision": run.train.precision,
        "backward": backward,
    } | others
