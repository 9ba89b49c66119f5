"""The default layout: kept rows sorted by expert, back to back, no padding. (N, D) and counts (E,)."""

from __future__ import annotations

from torch import Tensor

from swinmoe.config.moe import CapacityPolicy
from swinmoe.moe.dispatchers.base import Dispatcher, combine_rows, take_rows
from swinmoe.moe.registry import register_dispatcher
from swinmoe.moe.types import DispatchPlan, ExpertRows, Queues, Routing


@register_dispatcher("ragged")
class RaggedDispatcher(Dispatcher):
    """Experts get exactly their rows. Sizes depend on the routing, so one copy of the counts goes to the host."""

    def slots(self, queues: Queues, capacity: int | None, policy: CapacityPolicy) -> int | None:
        """None: there is no padding. `fixed` and `bounded` are the same here."""
        return None

    def scatter(self, x: Tensor, routing: Routing, plan: DispatchPlan) -> ExpertRows:
        """(T, D) -> (N, D) sorted by (expert, slot)."""
        return ExpertRows(take_rows(x, plan), plan.counts)

    def gather(self, rows: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """(N, D) -> (T, D)."""
        return combine_rows(rows, routing.gates, plan)
