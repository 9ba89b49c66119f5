"""The batches that capacity is tuned on, as the processes of a job see them.

Capacity is counted per process and micro-batch. So what is tuned on is cut as the job cuts it: step by step a batch of
every process. One process in place of the job has all of them, each of several its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice

from swinmoe.config import RunConfig
from swinmoe.data import Batch, DataBundle, TrainStream, eval_batches
from swinmoe.errors import ConfigError
from swinmoe.profiling.tune.passes import Mode

Steps = Sequence[Sequence[Batch]]
"""By micro-step: a batch of each process, in order of rank; or that of this process alone."""


def batches_for(
    run: RunConfig, bundle: DataBundle, mode: Mode, images: int, processes: int, rank: int | None = None
) -> Steps:
    """The first steps of training (augmented), or of evaluation: whole ones, all of one size, no image twice.

    Args:
        run: whose batch sizes, accumulation and augmentation they have.
        bundle: the data.
        mode: training or evaluation.
        images: that all processes together see at least, if there are so many; and two steps, one to choose on and one
            to check on.
        processes: of the job.
        rank: whose batches alone are wanted; None = every process's.

    Raises:
        ConfigError: the batch does not divide among the processes, or there are fewer training images than one has.
    """
    train = run.train
    ranks = range(processes) if rank is None else (rank,)
    if mode == "eval":
        size = train.eval_batch_size
        # A smaller one at the end is busier at its busiest expert, for its size; half of the batches would have it.
        whole = max(1, len(bundle.eval) // size)
        parts = [eval_batches(bundle.eval, batch_size=size, rank=r, world=processes) for r in ranks]
        return list(islice(zip(*parts, strict=True), min(whole, _wanted(images, size))))
    if len(bundle.train) < train.batch_size:
        raise ConfigError(
            f"there are {len(bundle.train)} training images, fewer than one train.batch_size={train.batch_size}; use "
            "more images or a smaller batch"
        )
    streams = [
        TrainStream(
            bundle.train,
            data=run.data,
            batch_size=train.batch_size,
            accumulation=train.accumulation,
            rank=r,
            world=processes,
            seed=run.seed,
            num_classes=bundle.num_classes,
            label_smoothing=train.label_smoothing,
        )
        for r in ranks
    ]
    steps = min(streams[0].steps_per_epoch, _wanted(images, train.batch_size))
    of_ranks = [chain.from_iterable(stream.iterate(0, steps)) for stream in streams]  # micro-batch after micro-batch
    return list(zip(*of_ranks, strict=True))


def _wanted(images: int, size: int) -> int:
    return max(2, -(-images // size))


def halves(steps: Steps) -> tuple[list[Batch], list[Batch]]:
    """Batches to choose on, and others to check on: every other step's. Of a lone step the same."""
    first, second = steps[::2], steps[1::2] or steps
    return list(chain.from_iterable(first)), list(chain.from_iterable(second))
