"""Experts on one process: the default execution, and the contract in its simplest form."""

from __future__ import annotations

from torch import Tensor

from swinmoe.moe.types import ExpertFn, ExpertRows, ExpertWeights, Route


class LocalExecution:
    """All experts are here, nothing travels, and this process's batch is the whole batch."""

    def prepare(self, counts: Tensor, slots: int | None) -> Route:
        """Ragged: one host copy of the counts (E,). Padded: nothing to find out."""
        if slots is not None:
            return Route(matrix=None, slots=slots)
        matrix = counts.unsqueeze(0).cpu()
        return Route(matrix=matrix, slots=None, rows=int(matrix.sum()))

    def run(self, x: ExpertRows, route: Route, w: ExpertWeights, fn: ExpertFn) -> Tensor:
        """Expert outputs in the order and shape of `x.rows`: (N, D) ragged, (E, C, D) padded."""
        return fn(x.rows, route.matrix, w)

    def reduce(self, stats: Tensor) -> Tensor:
        """`stats` itself."""
        return stats
