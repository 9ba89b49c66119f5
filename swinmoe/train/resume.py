"""Saving arms and going on from what was saved. Looking at a checkpoint changes nothing; only `go_on_from` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from swinmoe.checkpoint import (
    Saver,
    Stored,
    checkpoints,
    drop_newer,
    form_slice_groups,
    open_checkpoint,
    share,
)
from swinmoe.config.io import to_tree
from swinmoe.errors import CheckpointError, DamagedError
from swinmoe.runtime import describe_environment
from swinmoe.train.arm import Arm
from swinmoe.train.job import Job

MAY_DIFFER_ON_RESUME = (
    *("resume", "output_dir", "name", "log", "checkpoint", "parallel"),
    *("data.workers", "data.root", "data.index_dir", "data.download", "train.eval_batch_size"),
    *("model.grad_checkpointing", "model.attention_chunks", "train.offload_activations"),
    *("train.compile", "train.native_kernels"),
)
"""Config keys, and sections, that may change on the way. All but `parallel`, `model.attention_chunks`, `train.compile`
and `train.native_kernels`, which sum in another order and drop other units of experts, leave every bit of training as
it is; with another number of ranks the noise that ranks draw is another."""


@dataclass(frozen=True)
class Start:
    """Where training begins: at `step`, from a checkpoint, or at 0."""

    step: int = 0
    checkpoint: Path | None = None
    damaged: Mapping[Path, str] = field(default_factory=dict)
    """Newer checkpoints that were passed over, and what is wrong with them."""


def make_saver(job: Job, arms: Sequence[Arm]) -> Saver:
    """Who saves the checkpoints of `job`; a collective call where experts are sliced."""
    for arm in arms:
        form_slice_groups(arm.stacks, job.mesh)
    settings = job.run.checkpoint
    return Saver(
        job.checkpoints,
        job.mesh,
        keep_last=settings.keep_last,
        keep_best=settings.keep_best,
        asynchronous=settings.asynchronous,
    )


def save(job: Job, saver: Saver, arms: Sequence[Arm], step: int) -> None:
    """Checkpoint all arms at `step`; every rank takes part, and writes its share."""
    epoch, batch = divmod(step, job.stream.steps_per_epoch)
    state = {
        "arms": {arm.name: arm.values() for arm in arms},
        # Batches and draws follow from step and seed, and need no more; what they were is written for people, and the
        # number of batches to notice another data set.
        "sampler": {"epoch": epoch, "batch": batch, "batches_per_epoch": job.stream.steps_per_epoch},
        "random": {"seed": job.run.seed, "next": [job.run.seed, "step", step], "scheme": "keyed by purpose"},
        "provenance": _provenance(),
    }
    job.records.sync()  # what the checkpoint builds on must not be younger on disk than the checkpoint
    saver.save(step, {arm.name: arm.content() for arm in arms}, state, _score(arms))


@cache
def _provenance() -> dict[str, Any]:
    """What made this checkpoint; asked for once, because that starts processes."""
    return describe_environment()


def _score(arms: Sequence[Arm]) -> float | None:
    """Mean accuracy of the arms, if all were evaluated where they are."""
    found = [arm.scored[1] for arm in arms if arm.scored is not None and arm.scored[0] == arm.step]
    return sum(found) / len(found) if len(found) == len(arms) else None


def restore(job: Job, arms: Sequence[Arm]) -> Start:
    """Load the checkpoint that `resume` asks for into the arms. Writes nothing. A collective call.

    `auto` takes the newest whole one; what is damaged is passed over, and named in the answer.

    Raises:
        CheckpointError: it, or every one there is, is damaged; or it holds other arms, or was made by another config,
            for another length or on another data set.
    """
    if job.resume == "never":
        return Start()
    there = checkpoints(job.checkpoints)[::-1] if job.resume == "auto" else [Path(job.resume)]
    damaged: dict[Path, str] = {}
    for path in share(job.mesh, None, there)[0]:
        try:
            return Start(_load(job, arms, path), path, damaged)
        except DamagedError as error:
            damaged[path] = str(error)
            if job.resume != "auto":
                raise
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {str(job.checkpoints)!r} is whole: {'; '.join(damaged.values())}; restore one from a "
            "copy, or start a new run under another name"
        )
    return Start()


def _load(job: Job, arms: Sequence[Arm], path: Path) -> int:
    """Load `path` into the arms, on all ranks or none; its step."""
    problem, step = None, 0
    try:
        stored = open_checkpoint(path)
        stored.check()
        step = stored.step
        _check_position(job, stored)
        for arm in arms:
            if arm.name not in stored.state["arms"]:
                known = sorted(stored.state["arms"])
                raise CheckpointError(f"checkpoint {str(path)!r} has no arm {arm.name!r}; it holds {known}")
            prefix = stored.state["folders"][arm.name]
            saved = yaml.safe_load(stored.read_text(f"{prefix}config.yaml"))
            check_same(f"checkpoint {str(path)!r}", saved, to_tree(arm.run))
            arm.load(stored, prefix, stored.state["arms"][arm.name])
    except CheckpointError as error:
        problem = error
    share(job.mesh, problem, None)
    return step


def _check_position(job: Job, stored: Stored) -> None:
    saved, now = stored.state["sampler"]["batches_per_epoch"], job.stream.steps_per_epoch
    if saved != now:
        raise CheckpointError(
            f"checkpoint {str(stored.path)!r} counts {saved} batches per epoch, and the data set now gives {now}: its "
            "position and schedule would be others; go on with the same data, or start a new run under another name"
        )


def go_on_from(job: Job, arms: Sequence[Arm], start: Start) -> None:
    """Withdraw what lies beyond `start`: later records, and later checkpoints of a branch that is given up."""
    if job.resume == "never":
        return
    for arm in arms:
        job.records.write("superseded", arm=arm.name, seed=arm.run.seed, after_step=start.step)
    for path, wrong in start.damaged.items():
        job.progress.say(f"passed over {path.name}: {wrong}")
    if job.mesh.rank == 0:
        for kept in drop_newer(job.checkpoints, start.step, start.damaged):
            job.progress.say(f"kept for you to look at, and to remove: {kept}")
    found = start.checkpoint
    job.progress.say(f"resumed at step {start.step} from {found}" if found else "no checkpoint yet: starting afresh")


def check_same(what: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """`CheckpointError` that lists the keys in which two config trees differ, but for those that may."""
    differing = [
        f"{key} (saved {old!r}, now {new!r})"
        for key, (old, new) in _differences(saved, now).items()
        if not any(key == free or key.startswith(f"{free}.") for free in MAY_DIFFER_ON_RESUME)
    ]
    if differing:
        raise CheckpointError(
            f"{what} was made by another config: {'; '.join(differing[:6])}. Go on with the same config, or start a "
            "new run under another name"
        )


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    out: dict[str, tuple[Any, Any]] = {}
    for key in sorted(set(a) | set(b)):
        x, y, name = a.get(key), b.get(key), f"{prefix}{key}"
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            out |= _differences(x, y, f"{name}.")
        elif x != y:
            out[name] = (x, y)
    return out
