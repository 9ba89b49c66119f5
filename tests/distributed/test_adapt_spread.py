"""Adaptive capacity on several processes: one factor for all, from the needs of all, and the promise on each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pool import Pool

from swinmoe.config import RunConfig
from swinmoe.config.io import build
from swinmoe.data import Batch
from swinmoe.parallel import make_mesh
from swinmoe.runtime import make_accelerator
from swinmoe.train import Arm, Length, make_arm

pytestmark = pytest.mark.distributed
STEPS = 8


def run_of(ep_size: int, dispatcher: str) -> RunConfig:
    capacity = {
        "train": {
            "kind": "adaptive",
            "factor": 0.5,
            "adapt": {"max_drop": 0.1, "floor": 0.25, "margin": 0.0, "hysteresis": 0.0, "every": 2},
        }
    }
    return build(
        RunConfig,
        {
            "model": {
                "preset": "swin_moe_micro",
                "img_size": 16,
                "in_chans": 1,
                "embed_dim": 8,
                "num_heads": [1, 2],
                "patch_size": 4,
                "moe": {"num_experts": 4, "dispatcher": dispatcher, "capacity": capacity},
            },
            "train": {"batch_size": 12, "accumulation": 2, "steps": STEPS, "epochs": None},
            "data": {"image_size": 16},
            "parallel": {"ep_size": ep_size},
        },
    )


def arm_of(run: RunConfig) -> Arm:
    mesh = make_mesh(run.parallel, 4)
    return make_arm("model", run, mesh, make_accelerator("fp32"), Length(steps=STEPS), STEPS)


def batches_of(step: int, run: RunConfig, rank: int, world: int) -> list[Batch]:
    """The same images for every number of ranks; brighter from step to step, so that loads move."""
    draw = torch.Generator().manual_seed(step)
    found = []
    for _ in range(run.train.accumulation):
        images = torch.randn(6, 1, 16, 16, generator=draw) * (1 + step) + step
        labels = torch.randint(10, (6,), generator=draw)
        mine = slice(6 * rank // world, 6 * (rank + 1) // world)
        found.append(Batch(images[mine], labels[mine], None, torch.arange(6)[mine]))
    return found


def follow(ep_size: int, dispatcher: str) -> dict[str, Any]:
    """What one rank saw: factors after each step, its own largest need of each, and its worst drop."""
    run = run_of(ep_size, dispatcher)
    arm = arm_of(run)
    (name,) = arm.raw.moe_layers()
    factors, needs, worst, logs = [], [], 0.0, []
    note = arm.follower.note

    def watched(routing: Any) -> None:
        nonlocal worst
        stats = routing[name]
        worst = max(worst, 1 - int(stats.kept.sum()) / int(stats.routed.sum()))
        note(routing)

    arm.follower.note = watched  # type: ignore[method-assign]
    for step in range(STEPS):
        arm.train_step(batches_of(step, run, arm.mesh.rank, arm.mesh.world))
        needs.append(arm.follower._needs[name].item() if name in arm.follower._needs else None)
        factors.append(arm.follower.factors[name])
        if step % 4 == 3:
            logs.append(arm.take_log()["routing"][name])
    return {"factors": factors, "needs": needs, "worst": worst, "logs": logs, "state": arm.values()["capacity"]}


@pytest.mark.parametrize(("ep_size", "dispatcher"), [(1, "ragged"), (2, "ragged"), (2, "padded")])
def test_ranks_have_one_factor_and_each_keeps_the_promise(pool2: Pool, ep_size: int, dispatcher: str) -> None:
    one, other = pool2.run(follow, ep_size, dispatcher)
    assert one["factors"] == other["factors"] and one["state"] == other["state"]
    assert one["logs"] == other["logs"]
    assert len(set(one["factors"])) > 2  # it moved
    assert max(one["worst"], other["worst"]) <= 0.1
    assert one["needs"] != other["needs"]  # of its own each, so that a maximum is needed
    for log in one["logs"]:
        assert log["capacity_factor"] in one["factors"] and log["capacity_need"] > 0


def test_the_factor_is_that_of_the_rank_in_greatest_need(pool2: Pool) -> None:
    """Without margin and hysteresis a factor is the largest need of the two steps before."""
    ranks = pool2.run(follow, 2, "ragged")
    before = [max(rank["needs"][step] for rank in ranks) for step in range(0, STEPS, 2)]
    for number, step in enumerate(range(1, STEPS, 2)):
        assert ranks[0]["factors"][step] >= before[number]  # of the first of the two; the second may need more
