"""Tutel's kernels (Hwang et al. 2023) under our plan, our experts and our exchange. The only file that imports tutel.

Shapes: T tokens, D width, E experts, K choices, C slots per expert.

Tutel carries rows with one scatter and one gather kernel per choice, told where to by a tuple that its users may build
themselves: (E, experts, places, gates, C, counts), with one contiguous int32 (T,) column of experts and of places and
one float32 column of gates per choice. It leaves out a choice whose place is C or more: our drops.

Its exchange between ranks is not used: its backward pass ignores the group it was given.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from swinmoe.errors import BackendUnavailableError, RoutingError
from swinmoe.moe.dispatchers.padded import PaddedDispatcher
from swinmoe.moe.registry import register_dispatcher
from swinmoe.moe.types import DispatchPlan, ExpertRows, Routing

_WHERE = (
    "see 'Tutel Installation' in the README of github.com/microsoft/Tutel (it is built from source, against the torch "
    "that is installed)"
)
_INSTEAD = "moe.dispatcher=ragged needs nothing else"


@register_dispatcher("tutel")
class TutelDispatcher(PaddedDispatcher):
    """Padded layout by Tutel's `fast_encode` and `fast_decode`. Never run on a GPU by us.

    Rows pass its kernels as float32 whatever their dtype is: Tutel keeps one kernel per kind of device in a process,
    that of the dtype it met first, and on CPUs has none for float16. Widening and narrowing again loses nothing.

    Raises:
        BackendUnavailableError: tutel is not installed, or its build does not load.
    """

    def __init__(self) -> None:
        moe = _tutel()
        self._encode, self._decode = moe.fast_encode, moe.fast_decode

    def scatter(self, x: Tensor, routing: Routing, plan: DispatchPlan) -> ExpertRows:
        """(T, D) -> (E, C, D)."""
        _check(x)
        if x.shape[0] == 0 or plan.slots == 0:  # Tutel reshapes by -1, which has no answer where nothing is
            return super().scatter(x, routing, plan)
        rows = self._encode(x.float().contiguous(), _criterion(routing, plan), is_postscore=True)
        return ExpertRows(rows.to(x.dtype), plan.counts)

    def gather(self, rows: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """(E, C, D) -> (T, D)."""
        _check(rows)
        if routing.gates.shape[0] == 0 or plan.slots == 0:
            return super().gather(rows, routing, plan)
        y: Tensor = self._decode(rows.float().contiguous(), _criterion(routing, plan), is_postscore=True)
        return y.to(rows.dtype)


@cache
def tutel_serves(device_type: str) -> bool:
    """Whether a Tutel is here with kernels for `cpu` or `cuda` (which its build leaves out where it cannot)."""
    try:
        _tutel()
    except BackendUnavailableError:
        return False
    return device_type == "cpu" or (device_type == "cuda" and _has_gpu_kernels())


def _tutel() -> Any:
    try:
        return importlib.import_module("tutel.moe")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "tutel":
            raise BackendUnavailableError(_broken(error)) from error
        raise BackendUnavailableError(
            f"moe.dispatcher=tutel needs Tutel, which is not installed; {_WHERE}, or leave it: {_INSTEAD}"
        ) from None
    except ImportError as error:
        raise BackendUnavailableError(_broken(error)) from error


def _broken(error: ImportError) -> str:
    return (
        f"moe.dispatcher=tutel: Tutel is installed but does not load ({error}), as after an upgrade of torch; build it "
        f"again: {_WHERE}; or leave it: {_INSTEAD}"
    )


def _has_gpu_kernels() -> bool:
    return hasattr(importlib.import_module("tutel_custom_kernel"), "inject_source")


def _check(x: Tensor) -> None:
    if x.dtype == torch.float64:
        raise RoutingError(
            "moe.dispatcher=tutel was given float64 tokens, and Tutel would cut them to float32 without a word; "
            "use moe.dispatcher=ragged, padded or gshard, or float32 tokens"
        )
    if x.is_cuda:
        if not _has_gpu_kernels():
            raise BackendUnavailableError(
                f"moe.dispatcher=tutel was given tokens on {x.device}, but this Tutel was built for CPUs alone (its "
                f"build does so silently where it finds no CUDA compiler); {_WHERE}, or leave it: {_INSTEAD}"
            )
        if torch.cuda.current_stream(x.device) != torch.cuda.default_stream(x.device):
            raise RoutingError(
                "moe.dispatcher=tutel: Tutel's kernels run on the default stream, whatever the current one is, so that "
                "inside another stream or a CUDA graph they race; use moe.dispatcher=padded there"
            )


def _criterion(routing: Routing, plan: DispatchPlan) -> tuple[object, ...]:
    """Our plan in Tutel's words. Its kernels take columns for contiguous memory, and check it on CPUs alone."""
    experts = routing.expert_ids.t().to(torch.int32).contiguous().unbind()
    places = plan.slot.t().to(torch.int32).contiguous().unbind()
    gates = routing.gates.t().float().contiguous().unbind()
    return len(plan.counts), experts, places, gates, plan.slots, plan.counts
