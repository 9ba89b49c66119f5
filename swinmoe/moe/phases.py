"""Where in a step the work is: marks that cost nothing unless someone listens.

    route      scores, choice, queues, balance losses, and what ranks tell each other about counts
    scatter    tokens -> rows
    exchange_out, exchange_back
               rows to the ranks of their experts and back: copies, launches and all time spent waiting; gathered
               weights
    experts    the experts' arithmetic
    gather     rows -> tokens
    other      everything else

While someone listens, a tensor that passes from one phase to the next goes through a node of the autograd graph, the
identity, so that the backward pass says where it is too. Phases lie end to end: their times add up to the step's. With
nobody listening, and under `torch.compile` or `torch.export`, there is no node and no call leaves this file.

What checkpointing computes again happens in the backward pass, and counts there, under its own phase.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from swinmoe.moe.types import ExpertFn, ExpertWeights

LAYER_PHASES = ("route", "scatter", "exchange_out", "experts", "exchange_back", "gather")
OTHER, OPTIMIZER = "other", "optimizer"
FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
"""Passes: what a step turns to. A step says so itself, by `turn`."""


class Listener(Protocol):
    """Told of every border as it is crossed, in whatever thread runs that part of the step."""

    def crossed(self, direction: str, phase: str) -> None:
        """From now on the step is in pass `direction` (`forward`, `backward`, `update`) and in `phase`."""
        ...


class _State:
    """One per process, as the device is: the backward pass may run in a thread of its own."""

    listener: Listener | None = None
    direction = FORWARD
    phase = OTHER


_state = _State()


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Tell `listener` of all borders until the block ends. It must hold a whole step, or none of its backward pass."""
    assert _state.listener is None, "someone is listening already"
    _state.listener, _state.direction, _state.phase = listener, FORWARD, OTHER
    listener.crossed(FORWARD, OTHER)
    try:
        yield
    finally:
        _state.listener = None


def listening() -> bool:
    """True while someone listens to eager code."""
    # In this order: compiled code must not even look at the state, which it would be guarded on.
    return not torch.compiler.is_compiling() and _state.listener is not None


def current() -> str:
    """The phase that the step is in, to come back to."""
    return _state.phase if listening() else OTHER


def enter(phase: str) -> None:
    """The step goes over to `phase`, whichever pass it is in."""
    if listening():
        _cross(_state.direction, phase)


def turn(direction: str) -> None:
    """The step turns to another pass, outside all layers."""
    if listening():
        _cross(direction, OTHER)


def border(x: Tensor, before: str, after: str) -> Tensor:
    """`x` itself, on its way from phase `before` to phase `after`; its gradient goes the other way."""
    if not listening():
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        x = _Border.apply(x, before)
    _cross(_state.direction, after)
    return x


def watched(fn: ExpertFn) -> ExpertFn:
    """`fn`, between the exchanges before and after it."""
    if not listening():
        return fn

    def run(rows: Tensor, segments: Tensor | None, w: ExpertWeights) -> Tensor:
        out = fn(border(rows, "exchange_out", "experts"), segments, w)
        return border(out, "experts", "exchange_back")

    return run


def _cross(direction: str, phase: str) -> None:
    if _state.listener is not None and (direction, phase) != (_state.direction, _state.phase):
        _state.direction, _state.phase = direction, phase
        _state.listener.crossed(direction, phase)


class _Border(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, before: str) -> Tensor:
        ctx.before = before
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _cross(_state.direction, ctx.before)
        return grad, None
