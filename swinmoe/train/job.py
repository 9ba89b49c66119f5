"""What the arms that train on the same batches share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swinmoe.config import RunConfig
from swinmoe.data import DataBundle, TrainStream
from swinmoe.parallel import Mesh
from swinmoe.records import RunRecord
from swinmoe.train.progress import Progress


@dataclass
class Job:
    """What the arms of one seed share."""

    run: RunConfig
    """Data, batch, logging and checkpoint settings; equal for all arms."""
    mesh: Mesh
    bundle: DataBundle
    stream: TrainStream
    records: RunRecord
    checkpoints: Path
    resume: str
    progress: Progress
    peak_flops: float | None = None
    tracker: Any = None
    """Something with `log(values, step)`: Accelerate's trackers; None for none."""
    around_step: Callable[[int], AbstractContextManager[object]] = nullcontext
    """Entered for the training of each step, by its number from 1: a profiler's."""
