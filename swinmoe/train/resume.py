"""Saving arms and going on from what was saved. Looking at a checkpoint changes nothing; only `go_on_from` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swinmoe.checkpoint import drop_newer, latest_checkpoint, load_checkpoint, save_checkpoint
from swinmoe.config.io import to_tree
from swinmoe.errors import CheckpointError
from swinmoe.train.arm import Arm, Tensors
from swinmoe.train.job import Job

MAY_DIFFER_ON_RESUME = (
    *("resume", "output_dir", "name", "log", "checkpoint", "parallel"),
    *("data.workers", "data.root", "data.download", "train.eval_batch_size", "model.grad_checkpointing"),
)
"""Config keys, and sections, that may change on the way. All but `parallel` leave every bit of training as it is; with
another number of ranks the noise that ranks draw is another."""


@dataclass(frozen=True)
class Start:
    """Where training begins: at `step`, from a checkpoint, or at 0."""

    step: int = 0
    checkpoint: Path | None = None


def save(job: Job, arms: Sequence[Arm], step: int) -> None:
    """Checkpoint all arms at `step`; every rank takes part, the main one writes."""
    tensors: Tensors = {}
    values: dict[str, Any] = {}
    for arm in arms:
        own, values[arm.name] = arm.state()
        tensors |= {f"{arm.name}/{stem}": group for stem, group in own.items()}
    if job.mesh.rank == 0:
        job.records.sync()  # what the checkpoint builds on must not be younger on disk than the checkpoint
        configs = {arm.name: to_tree(arm.run) for arm in arms}
        state = {"arms": values, "configs": configs}
        save_checkpoint(job.checkpoints, step, tensors, state, job.run.checkpoint.keep_last)


def restore(job: Job, arms: Sequence[Arm]) -> Start:
    """Load the checkpoint that `resume` asks for into the arms. Writes nothing.

    Raises:
        CheckpointError: it is damaged, holds other arms, or was made by another config or for another length.
    """
    if job.resume == "never":
        return Start()
    path = latest_checkpoint(job.checkpoints) if job.resume == "auto" else Path(job.resume)
    if path is None:
        return Start()
    checkpoint = load_checkpoint(path)
    for arm in arms:
        if arm.name not in checkpoint.state["arms"]:
            known = sorted(checkpoint.state["arms"])
            raise CheckpointError(f"checkpoint {str(path)!r} has no arm {arm.name!r}; it holds {known}")
        check_same(f"checkpoint {str(path)!r}", checkpoint.state["configs"][arm.name], to_tree(arm.run))
        prefix = f"{arm.name}/"
        own = {k.removeprefix(prefix): v for k, v in checkpoint.tensors.items() if k.startswith(prefix)}
        arm.load(own, checkpoint.state["arms"][arm.name])
    return Start(checkpoint.step, path)


def go_on_from(job: Job, arms: Sequence[Arm], start: Start) -> None:
    """Withdraw what lies beyond `start`: later records, and later checkpoints of a branch that is given up."""
    if job.resume == "never":
        return
    for arm in arms:
        job.records.write("superseded", arm=arm.name, seed=arm.run.seed, after_step=start.step)
    if job.mesh.rank == 0:
        drop_newer(job.checkpoints, start.step)
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
