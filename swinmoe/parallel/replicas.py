"""Sums experts' gradients over replicas, while the backward pass is still on its way to earlier layers.

A layer's expert gradients are complete once the backward pass has left the layer, which a node on its rows notices. The
sums are then begun, layer by layer and in the same order on all ranks, and `sync_expert_gradients` waits for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from swinmoe.comm.failure import naming
from swinmoe.comm.traffic import note_all_reduce
from swinmoe.errors import DistributedError
from swinmoe.moe.types import ExpertExecution, ExpertFn, ExpertRows, ExpertWeights, Route

BUCKET_BYTES = 2**20
"""Small gradients share a message up to this size; a larger one travels alone, without a copy."""


class GradientSum:
    """Sums of gradients over a group, under way.

    Args:
        parameters: whose `.grad` is summed, in place. A missing one counts as zeros, so that all ranks send the same.
        group: the ranks concerned.
        what: names the sum in errors.
    """

    def __init__(self, parameters: Iterable[Tensor], group: dist.ProcessGroup, what: str) -> None:
        self.what = what
        gradients = []
        for parameter in parameters:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        self._flights = []
        for bucket in _buckets(gradients):
            alone = len(bucket) == 1 and bucket[0].is_contiguous()
            flat = bucket[0] if alone else torch.cat([g.reshape(-1) for g in bucket])
            note_all_reduce(flat, group, what)
            with naming(what):
                work = dist.all_reduce(flat, group=group, async_op=True)
            assert work is not None
            self._flights.append(([] if alone else bucket, flat, work))

    def finish(self) -> None:
        """Wait for the sums, and put them where the gradients are."""
        for bucket, flat, work in self._flights:
            with naming(self.what):
                work.wait()
            for gradient, total in zip(bucket, flat.split([g.numel() for g in bucket]) if bucket else (), strict=True):
                gradient.copy_(total.view_as(gradient))


class SummedOverReplicas:
    """An execution whose layer's expert gradients are summed as soon as they are complete.

    Args:
        then: what runs the layer.
        parameters: the layer's experts'.
        group: the ranks that hold the same experts.
        layer: the layer's name in errors.
    """

    def __init__(
        self, then: ExpertExecution, parameters: list[Tensor], group: dist.ProcessGroup, layer: str = "expert layer"
    ) -> None:
        self.then, self.parameters, self.group = then, parameters, group
        self.what = f"{layer}: summing expert gradients over replicas"
        self.paused = False
        """True while backward passes only accumulate."""
        self._due = 0  # forward passes whose backward pass is to come
        self._sum: GradientSum | None = None

    def prepare(self, counts: Tensor, slots: int | None) -> Route:
        """As the inner execution. Called once a forward pass, recomputation or not: passes are counted here."""
        if torch.is_grad_enabled():
            if self._sum is not None:
                raise DistributedError(
                    f"{self.what}: another training pass began before sync_expert_gradients was called; call it after "
                    "the last backward pass of every step, and run the backward passes before it under no_sync(model)"
                )
            self._due += 1
        return self.then.prepare(counts, slots)

    def run(self, x: ExpertRows, route: Route, w: ExpertWeights, fn: ExpertFn) -> Tensor:
        """As the inner execution."""
        if torch.is_grad_enabled() and x.rows.requires_grad:
            # Before anything else of the layer, so that its backward comes after everything else of the layer.
            x = ExpertRows(_Leaving.apply(x.rows, self), x.counts)
        return self.then.run(x, route, w, fn)

    def reduce(self, stats: Tensor) -> Tensor:
        """As the inner execution."""
        return self.then.reduce(stats)

    def left(self) -> None:
        """A backward pass has left the layer."""
        self._due -= 1
        if self._due == 0 and not self.paused:
            self._sum = GradientSum(self.parameters, self.group, self.what)

    def finish(self) -> None:
        """Sum what is not summed yet, and wait. A collective call, once a step."""
        with torch.no_grad():
            under_way = self._sum or GradientSum(self.parameters, self.group, self.what)
            under_way.finish()
        self._sum, self._due = None, 0

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertExecution:
        return self.then  # a copy of the layer has other parameters


class _Leaving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: SummedOverReplicas) -> Tensor:
        ctx.layer = layer
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.layer.left()
        return grad, None


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of one dtype of at most `BUCKET_BYTES`, in order; a tensor above that size alone."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
