"""`swinmoe train`: one arm from a config."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from swinmoe.config import RunConfig
from swinmoe.train.arm import Arm, make_arm
from swinmoe.train.loop import fit
from swinmoe.train.resume import restore
from swinmoe.train.schedule import Length, planned_steps
from swinmoe.train.session import open_session


def train(
    run: RunConfig,
    *,
    show: bool = True,
    around_step: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> tuple[Path, Arm]:
    """Train the model of `run`; returns its output folder (records, checkpoints, config) and the trained arm.

    `around_step` is entered for the training of each step, by its number from 1.

    Raises:
        SwinMoEError: see `open_session`, `make_arm` and `fit`.
    """
    folder = Path(run.output_dir) / run.name
    with open_session("train", run, config=run, folder=folder, resume=run.resume, show=show) as session:
        job = session.job(run)
        job.around_step = around_step
        length = Length(steps=planned_steps(run.train, job.stream.steps_per_epoch))
        arm = make_arm("model", run, session.mesh, session.accelerator, length, job.stream.steps_per_epoch)
        start = restore(job, [arm])
        session.begin()
        session.describe(arm)
        fit(job, [arm], start)
    return folder, arm
