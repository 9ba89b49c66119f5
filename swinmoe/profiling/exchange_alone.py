"""What the exchanges of a step take by themselves: the same rows out and back with nothing done to them in between.

A step is watched once for what its expert layers send, pass by pass, what checkpointing sends again included. What is
timed is then each layer's own execution with experts that return what they are given: no arithmetic, no other layer,
no gradient that anyone keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swinmoe.comm import listen
from swinmoe.moe import ExpertRows, ExpertWeights, MoEMlp
from swinmoe.moe.precision import autocast_dtype
from swinmoe.moe.types import ExpertExecution, ExpertFn, Route
from swinmoe.parallel import Mesh, global_sum
from swinmoe.parallel.replicas import SummedOverReplicas
from swinmoe.profiling.clock import Step, Timing


@dataclass
class Passage:
    """One layer's rows in one forward pass, and the way that they took; the rows themselves are not kept."""

    layer: MoEMlp
    execution: ExpertExecution
    route: Route
    counts: Tensor
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None
    """None: off."""
    backward: bool
    """A backward pass brings gradients the same way."""
    forwards: int = 1
    """Times that they went: 2 where the backward pass computes activations again."""


def watch_passages(step: Callable[[], Any], layers: Iterable[MoEMlp]) -> list[Passage]:
    """Run `step` once and say what `layers` sent, in order; a collective call where experts are spread."""
    seen: dict[int, Passage] = {}
    with _listening(layers, seen):
        step()
    return list(seen.values())


def exchange_alone(passages: Sequence[Passage]) -> Step:
    """A step that is these passages and nothing else, one after another, forward and backward.

    It leaves every `.grad` as it is, and replicas' sums of gradients do not learn of it. A collective call.
    """
    rows: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}

    def numbers(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        # Whose they are makes no difference to an exchange: passages of one shape share them.
        key = (shape, dtype, device)
        if key not in rows:
            rows[key] = torch.randn(shape, dtype=dtype, device=device)
        return rows[key]

    def travel(p: Passage) -> None:
        sent = numbers(p.shape, p.dtype, p.device).detach().requires_grad_(p.backward)
        with torch.set_grad_enabled(p.backward), _autocast(p):
            for _ in range(p.forwards):
                out = p.execution.run(ExpertRows(sent, p.counts), p.route, p.layer.experts.weights(), _echo)
        if p.backward:
            weights = [w for w in p.layer.experts.parameters() if w.requires_grad]  # gathered ones have a way back
            slope = numbers(out.shape, out.dtype, out.device)
            torch.autograd.grad(out, [sent, *weights], slope, allow_unused=True)

    def step() -> None:
        for passage in passages:
            travel(passage)

    return step


def compare_alone(alone: Step, timing: Timing, exposed: float, mesh: Mesh) -> dict[str, float]:
    """The keys of a `measurement` that an exchange alone gives; a collective call.

    Args:
        alone: what was timed.
        timing: its times.
        exposed: milliseconds that the step spends in its exchanges.
        mesh: the ranks that stepped together.
    """
    moved = bytes_sent(alone, mesh)
    return {
        "exposed_ms": exposed,
        "hidden_ms": max(0.0, timing.median - exposed),
        "exchange_ms": timing.median,
        "exchange_bytes": moved,
        "bandwidth": moved / (timing.median / 1000),
    }


def bytes_sent(step: Step, mesh: Mesh) -> float:
    """Bytes that one `step` sends from a rank to others, the mean; a collective call."""
    with listen() as heard:
        step()
    own = torch.tensor(sum(message.bytes for message in heard), dtype=torch.float64)
    return float(global_sum(own, mesh)) / mesh.world


class _Listening:
    """An execution that writes down what passes through it.

    Args:
        layer: whose.
        then: what runs the layer.
        seen: passages by their route, of which each forward pass makes one and recomputation none.
    """

    def __init__(self, layer: MoEMlp, then: ExpertExecution, seen: dict[int, Passage]) -> None:
        self.layer, self.then, self.seen = layer, then, seen

    def prepare(self, counts: Tensor, slots: int | None) -> Route:
        """As the inner execution."""
        return self.then.prepare(counts, slots)

    def run(self, x: ExpertRows, route: Route, w: ExpertWeights, fn: ExpertFn) -> Tensor:
        """As the inner execution."""
        rows, known = x.rows, self.seen.get(id(route))
        if known is None:
            self.seen[id(route)] = Passage(
                self.layer,
                self.then,
                route,
                x.counts,
                rows.shape,
                rows.dtype,
                rows.device,
                autocast_dtype(rows),
                torch.is_grad_enabled() and rows.requires_grad,
            )
        else:
            known.forwards += 1
        return self.then.run(x, route, w, fn)

    def reduce(self, stats: Tensor) -> Tensor:
        """As the inner execution."""
        return self.then.reduce(stats)


@contextmanager
def _listening(layers: Iterable[MoEMlp], seen: dict[int, Passage]) -> Iterator[None]:
    """Within it, passages of `layers` are written down. Sums over replicas stay outermost, where they are looked for,
    and what is written down is below them."""
    before = []
    for layer in layers:
        outer = layer.execution
        holder, name = (outer, "then") if isinstance(outer, SummedOverReplicas) else (layer, "execution")
        before.append((holder, name, getattr(holder, name)))
        setattr(holder, name, _Listening(layer, getattr(holder, name), seen))
    try:
        yield
    finally:
        for holder, name, execution in before:
            setattr(holder, name, execution)


def _autocast(p: Passage) -> AbstractContextManager[Any]:
    return nullcontext() if p.autocast is None else torch.autocast(p.device.type, p.autocast)


class _Echo(torch.autograd.Function):
    """Rows come back as they are. Weights that were gathered get zeros, so that their way back is travelled too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, *weights: Tensor) -> Tensor:
        ctx.weights = [(w.shape, w.dtype, w.device) for w in weights]
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.weights)


def _echo(rows: Tensor, segments: Tensor | None, w: ExpertWeights) -> Tensor:
    gathered = [t for t in (w.fc1, w.b1, w.fc2, w.b2) if t is not None and not t.is_leaf]
    out: Tensor = _Echo.apply(rows, *gathered)
    return out
