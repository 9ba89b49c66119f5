"""Static shapes: (E, C, D), each expert's queue padded with zero rows to C slots."""

from __future__ import annotations

from torch import Tensor

from swinmoe.config.moe import CapacityPolicy
from swinmoe.moe.dispatchers.base import Dispatcher, combine_rows, take_rows
from swinmoe.moe.registry import register_dispatcher
from swinmoe.moe.types import DispatchPlan, ExpertRows, Queues, Routing


@register_dispatcher("padded")
class PaddedDispatcher(Dispatcher):
    """With fixed capacity no shape and no branch depends on the routing: no host sync, and CUDA graphs can hold it.

    Where experts are spread, ranks first agree on the number of slots, between hosts: the device does not wait, but
    graphs end there. `bounded` and `dropless` pad to the longest queue, whose length the host has to ask for.
    """

    def slots(self, queues: Queues, capacity: int | None, policy: CapacityPolicy) -> int | None:
        """C if it is fixed, else the longest kept queue."""
        if policy.kind == "fixed":
            return capacity
        return int(queues.counts.max())

    def scatter(self, x: Tensor, routing: Routing, plan: DispatchPlan) -> ExpertRows:
        """(T, D) -> (E, C, D)."""
        assert plan.slots is not None
        rows = take_rows(x, plan).view(len(plan.counts), plan.slots, x.shape[1])
        return ExpertRows(rows, plan.counts)

    def gather(self, rows: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """(E, C, D) -> (T, D)."""
        # By way of one axis: torch.export, which holds C as a symbol, cannot tell that E·C is not E.
        return combine_rows(rows.reshape(-1).view(-1, rows.shape[-1]), routing.gates, plan)
