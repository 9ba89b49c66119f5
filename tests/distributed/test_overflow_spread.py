"""Skipping a step is the business of all ranks: an infinity in one rank's experts is seen by no other rank alone."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from micro import MICRO
from pool import Pool

from swinmoe.config import ParallelConfig
from swinmoe.config.io import build
from swinmoe.config.run import RunConfig
from swinmoe.data import build_data
from swinmoe.errors import NonFiniteLossError
from swinmoe.parallel import is_expert_parameter, make_mesh
from swinmoe.runtime import make_accelerator
from swinmoe.train import Length, make_arm
from swinmoe.train.loss_scale import LossScale
from swinmoe.train.place import place
from swinmoe.train.session import make_stream

pytestmark = pytest.mark.distributed

RUN = {
    "model": {
        **MICRO,
        "drop_path_rate": 0.0,
        "moe": {"num_experts": 4, "top_k": 2},
    },
    "data": {"name": "digits", "limit": 64},
    "train": {"steps": 4, "epochs": None, "batch_size": 32},
}


def digest(model: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def steps_with_an_infinity(ep_size: int, dynamic: bool) -> dict[str, Any]:
    """Three steps; in the second, one element of one gradient on rank 1 becomes infinite.

    float16 needs a GPU; its scale and its skipping do not, and run here in float32.
    """
    run = build(RunConfig, RUN | {"parallel": {"ep_size": ep_size}})
    mesh = make_mesh(ParallelConfig(ep_size=ep_size), 4)
    bundle = build_data(run.data, seed=run.seed)
    stream = make_stream(run, bundle, mesh)
    arm = make_arm("model", run, mesh, make_accelerator("fp32", cpu=True), Length(steps=4), stream.steps_per_epoch)
    arm.scale = LossScale(value=2.0**10, dynamic=dynamic, growth_interval=2)
    poisoned = next(p for n, p in arm.raw.named_parameters() if ".experts." in n and n.endswith("weight"))
    assert is_expert_parameter(poisoned) == (ep_size > 1)

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        if arm.step == 1 and mesh.rank == 1:
            gradient = gradient.clone()
            gradient.view(-1)[0] = torch.inf
        return gradient

    poisoned.register_hook(poison)
    seen: dict[str, Any] = {"scales": [], "parameters": [digest(arm.raw)], "dense": None, "error": None}
    for batches in stream.iterate(0, 3):
        try:
            arm.train_step(tuple(place(b, arm.device, "fp32") for b in batches))
        except NonFiniteLossError as error:
            seen["error"] = str(error)
            return seen | {"parameters": [*seen["parameters"], digest(arm.raw)]}
        seen["scales"].append((arm.scale.value, arm.scale.good_steps))
        seen["parameters"].append(digest(arm.raw))
    dense = [p.detach().numpy().tobytes() for p in arm.raw.parameters() if not is_expert_parameter(p)]
    return seen | {"dense": hashlib.sha256(b"".join(dense)).hexdigest()}


@pytest.mark.parametrize("ep_size", [2, 1])
def test_an_overflow_of_one_rank_is_skipped_by_all(pool2: Pool, ep_size: int) -> None:
    ranks = pool2.run(steps_with_an_infinity, ep_size, True)
    for rank in ranks:
        before, first, second, third = rank["parameters"]
        assert before != first == second != third  # the second step is not taken, the others are
        assert rank["scales"] == [(1024.0, 1), (512.0, 0), (512.0, 1)]
    assert ranks[0]["dense"] == ranks[1]["dense"]


def test_without_a_scale_to_lower_all_ranks_stop_at_the_same_step(pool2: Pool) -> None:
    ranks = pool2.run(steps_with_an_infinity, 2, False)
    for rank in ranks:
        assert "not finite at step 2" in rank["error"] and len(rank["parameters"]) == 3
        assert rank["parameters"][1] == rank["parameters"][2]
