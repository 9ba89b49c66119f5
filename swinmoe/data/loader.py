"""The order in which samples reach each rank, and the loader that brings them.

B global batch, A accumulation steps, R ranks, b = B/(A·R) images of a micro-batch
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Generator, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from swinmoe.config import DataConfig
from swinmoe.data.batch import Batch
from swinmoe.data.dataset import ImageDataset
from swinmoe.data.mixup import Mixer
from swinmoe.data.order import windowed
from swinmoe.errors import ConfigError, SwinMoEError
from swinmoe.randomness import generator

Order = tuple[int | None, list[int]]
"""What a worker is asked for: an epoch (None = plain views) and sample indices."""


class TrainStream:
    """The endless, reproducible stream of training batches, as one rank sees it.

    Each epoch is a permutation drawn by (seed, epoch), of all images or, with `data.shuffle_window`, of tar shards and
    then of nearby images; a step takes the next B of it, and what does not fill a batch is left out of that epoch.
    Micro-batch m of rank r is the contiguous slice m·R + r of the step's batch: the images of a step are the same for
    any number of ranks and accumulation steps, and with a given A so are those that all ranks together see in
    micro-step m. Mixup, where on, mixes inside each micro-batch, so its pairs depend on b.

    Args:
        dataset: the training split.
        data: for mixup and the number of workers.
        batch_size: B, images per optimiser step over all ranks and micro-batches.
        accumulation: A.
        rank, world: this rank and R.
        seed: of the order and of mixup.
        num_classes, label_smoothing: for mixup's soft targets.

    Raises:
        ConfigError: B that does not divide by A·R, a data set smaller than B, or an odd b with mixup.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        data: DataConfig,
        batch_size: int,
        accumulation: int,
        rank: int,
        world: int,
        seed: int,
        num_classes: int,
        label_smoothing: float,
    ) -> None:
        parts = accumulation * world
        if batch_size < 1 or batch_size % parts:
            low = batch_size // parts * parts
            near = f"{low} or {low + parts}" if low > 0 else f"{parts}"
            raise ConfigError(
                f"train.batch_size={batch_size} does not divide into {world} rank(s) x {accumulation} accumulation "
                f"step(s); use a multiple of {parts}, e.g. {near}"
            )
        if len(dataset) < batch_size:
            fits = len(dataset) // parts * parts
            advice = f"use train.batch_size={fits} or less" if fits else "use fewer ranks or accumulation steps"
            raise ConfigError(
                f"the training set has {len(dataset)} images, fewer than one train.batch_size={batch_size}; {advice}, "
                "or more data (data.limit, data.holdout, data.synthetic_samples)"
            )
        mixer = None
        if Mixer.wanted(data.mixup):
            if (batch_size // parts) % 2:
                raise ConfigError(
                    f"mixup and cutmix mix images in pairs, but a micro-batch has {batch_size // parts} images; use a "
                    f"train.batch_size that is a multiple of {2 * parts}"
                )
            mixer = Mixer(data.mixup, num_classes=num_classes, label_smoothing=label_smoothing, seed=seed)
        self.steps_per_epoch: int = len(dataset) // batch_size
        self._dataset = dataset
        self._fetch = _Fetch(dataset, mixer)
        self._workers = data.workers
        self._batch_size, self._accumulation = batch_size, accumulation
        self._rank, self._world = rank, world
        self._seed = seed
        self._window = data.shuffle_window

    def iterate(self, start_step: int, stop_step: int) -> Iterator[tuple[Batch, ...]]:
        """For each optimiser step in [start_step, stop_step) this rank's A micro-batches; nothing earlier is loaded.

        One loader serves the whole range, across epochs. Its workers end when the iterator is exhausted or closed.
        """
        batches = _load(self._fetch, self._orders(start_step, stop_step), self._workers)
        try:
            for _ in range(start_step, stop_step):
                yield tuple(islice(batches, self._accumulation))
        finally:
            batches.close()

    def _orders(self, start_step: int, stop_step: int) -> Iterator[Order]:
        b = self._batch_size // (self._accumulation * self._world)
        epoch, order = -1, torch.empty(0)
        for step in range(start_step, stop_step):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self._order(epoch)
            first = step % self.steps_per_epoch * self._batch_size
            for micro in range(self._accumulation):
                start = first + (micro * self._world + self._rank) * b
                yield epoch, order[start : start + b].tolist()

    def _order(self, epoch: int) -> Tensor:
        draws, shards = generator("order", self._seed, epoch), self._dataset.shards
        if self._window is not None and shards is not None:
            return windowed(shards, self._window, draws)
        return torch.randperm(len(self._dataset), generator=draws)


def eval_batches(dataset: ImageDataset, *, batch_size: int, rank: int, world: int, workers: int = 0) -> Iterator[Batch]:
    """Every sample exactly once over all ranks, plain views, the same number of batches on each rank.

    The order is a fixed shuffle: in a class-sorted folder whole batches would otherwise be of one class, which
    overflows the capacity of the experts that serve it. Where a batch is smaller than `world`, some ranks get an
    empty one of shape (0, C, H, W), because expert-parallel evaluation needs every rank in every collective.

    Args:
        batch_size: images per step over all ranks.
        rank, world: this rank and how many there are.
        workers: loader processes; 0 loads in this process.
    """
    if batch_size < 1:
        raise ConfigError(f"train.eval_batch_size={batch_size} must be at least 1")
    return _load(_Fetch(dataset, None), _eval_orders(len(dataset), batch_size, rank, world), workers)


def _eval_orders(count: int, batch_size: int, rank: int, world: int) -> Iterator[Order]:
    order = torch.randperm(count, generator=generator("evaluation order"))
    for chunk in order.split(batch_size):
        n = len(chunk)
        yield None, chunk[n * rank // world : n * (rank + 1) // world].tolist()


class _Fetch(Dataset[Batch | SwinMoEError]):
    """Turns an order into a batch, in whichever process the loader runs it."""

    def __init__(self, dataset: ImageDataset, mixer: Mixer | None) -> None:
        self._dataset = dataset
        self._mixer = mixer

    def __getitem__(self, order: Order) -> Batch | SwinMoEError:
        epoch, indices = order
        try:
            images, targets = self._dataset.batch(epoch, indices)
        except SwinMoEError as error:
            return error  # raised by the receiver: torch would bury the message in a worker's traceback
        soft: Tensor | None = None
        if self._mixer is not None and epoch is not None:
            images, soft = self._mixer(images, targets, epoch=epoch, first=indices[0])
        return Batch(images, targets, soft, torch.tensor(indices, dtype=torch.int64))


def _load(fetch: _Fetch, orders: Iterator[Order], workers: int) -> Generator[Batch, None, None]:
    loader: Any = DataLoader(
        fetch,
        sampler=orders,
        batch_size=None,  # an order already is a whole micro-batch
        collate_fn=_unchanged,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # The loader draws a base seed for its workers; without a generator of its own it would advance torch's.
        generator=generator("loader"),
        # Forked workers start at once and share the images; they use neither CUDA nor the process group.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of every fork beside threads; the workers touch none of the parent's.
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
        batches = iter(loader)
    for batch in batches:
        if isinstance(batch, SwinMoEError):
            raise batch
        yield batch


def _unchanged(batch: Any) -> Any:
    return batch
