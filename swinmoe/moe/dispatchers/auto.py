"""`auto`: a dispatcher chosen by what the layer meets, and said aloud.

Shapes: T tokens, D width, E experts, C slots per expert.

The layout (ragged or padded) follows from device and capacity alone, which ranks share, so all of them exchange the
same way. Tutel or our own code for the padded layout is a choice each process may make by itself: shapes and numbers
are the same.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from swinmoe.config.moe import CapacityPolicy
from swinmoe.moe.dispatchers.base import Dispatcher
from swinmoe.moe.dispatchers.padded import PaddedDispatcher
from swinmoe.moe.dispatchers.ragged import RaggedDispatcher
from swinmoe.moe.dispatchers.tutel import TutelDispatcher, tutel_serves
from swinmoe.moe.registry import register_dispatcher
from swinmoe.moe.types import DispatchPlan, ExpertRows, Queues, Routing

Kind = Literal["fixed", "bounded", "dropless", "adaptive"]
_NOT_TIMED = "never timed on a GPU by us, so time it against the others"


def choose(device: torch.device | str, dtype: torch.dtype, kind: Kind, *, tutel: bool | None = None) -> tuple[str, str]:
    """Which dispatcher `auto` takes, and why.

    Args:
        device: where the tokens are.
        dtype: theirs; under autocast it may differ between the way to the experts and the way back.
        kind: of the capacity policy in force.
        tutel: whether a Tutel with kernels for the device is here; None = look.

    Returns:
        (name, reason), e.g. ("ragged", "on a CPU ..."). It depends on the arguments alone.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return "ragged", "on a CPU sizes are known without waiting, and rows of padding would only cost"
    if kind != "fixed":
        return "ragged", (
            "unless capacity is fixed, the padded layouts too must ask for a length, and pad to the longest queue; "
            f"{_NOT_TIMED}"
        )
    if dtype == torch.float32 and device.type == "cuda" and (tutel_serves(device.type) if tutel is None else tutel):
        return "tutel", f"capacity is fixed, rows are float32, and Tutel's GPU kernels are here; {_NOT_TIMED}"
    return "padded", f"with fixed capacity its shapes never wait for the host; {_NOT_TIMED}"


@register_dispatcher("auto")
class AutoDispatcher(Dispatcher):
    """Hands each call to the dispatcher that `choose` names; logs every choice once, with its reason."""

    def __init__(self) -> None:
        self._ragged, self._padded = RaggedDispatcher(), PaddedDispatcher()

    def slots(self, queues: Queues, capacity: int | None, policy: CapacityPolicy) -> int | None:
        """Those of the layout chosen."""
        # Only the layout is settled here; both of the padded kind have the same slots.
        name, _ = choose(queues.slot.device, torch.float32, policy.kind, tutel=False)
        chosen: Dispatcher = self._ragged if name == "ragged" else self._padded
        return chosen.slots(queues, capacity, policy)

    def scatter(self, x: Tensor, routing: Routing, plan: DispatchPlan) -> ExpertRows:
        """(T, D) -> rows of the layout chosen."""
        return self._for(x, plan).scatter(x, routing, plan)

    def gather(self, rows: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """Rows of the layout chosen -> (T, D)."""
        return self._for(rows, plan).gather(rows, routing, plan)

    def _for(self, x: Tensor, plan: DispatchPlan) -> Dispatcher:
        # A plan with slots off the CPU comes of fixed capacity, by `choose` itself.
        name, reason = choose(x.device, x.dtype, "dropless" if plan.slots is None else "fixed")
        if not torch.compiler.is_compiling():
            _announce(name, reason)
        if name == "tutel":
            return _tutel_dispatcher()
        return self._ragged if name == "ragged" else self._padded


@cache
def _tutel_dispatcher() -> TutelDispatcher:
    return TutelDispatcher()


@cache
def _announce(name: str, reason: str) -> None:
    logging.getLogger("swinmoe").info("moe.dispatcher=auto takes %s: %s", name, reason)
