"""Times of ways to run a model's experts: whole steps of the run itself, in turns, on all ranks.

Images are random numbers, already where they are needed; the learning rate is next to nothing. A collective call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from swinmoe.config import RunConfig
from swinmoe.data import Batch
from swinmoe.parallel import make_mesh
from swinmoe.profiling.clock import Step, Timing, take_turns
from swinmoe.profiling.model import random_batches, still
from swinmoe.runtime import make_accelerator
from swinmoe.train import Arm, Length, make_arm
from swinmoe.train.place import place


def step_times(
    runs: Mapping[str, RunConfig],
    device: torch.device,
    *,
    backward: bool = True,
    rounds: int = 9,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Timing]:
    """Time a step of each run: training with its optimiser's, or forward passes of the same batch.

    All models are held at once, so that they can take turns.
    """
    first = next(iter(runs.values()))
    accelerator = make_accelerator(first.train.precision, timeout_minutes=first.parallel.timeout_minutes)
    steps: dict[str, Step] = {}
    group = None
    for name, run in runs.items():
        say(f"building: {name}")
        assert run.model.moe is not None
        mesh = make_mesh(run.parallel, run.model.moe.num_experts)
        group = mesh.world_group
        arm = make_arm(name, still(run), mesh, accelerator, Length(steps=10**9), 10**9)
        batches = [place(batch, device, run.train.precision) for batch in random_batches(run, mesh)]
        steps[name] = partial(arm.train_step, batches) if backward else partial(_infer, arm, batches)
    say(f"{len(steps)} ways take turns, {rounds} rounds")
    taken = take_turns(steps, rounds, group=group, device=device)
    accelerator.free_memory()  # it keeps every model that it has prepared
    return taken


def _infer(arm: Arm, batches: list[Batch]) -> None:
    arm.raw.eval()
    with torch.inference_mode(), arm.autocast():
        for batch in batches:
            arm.raw(batch.images)
