"""From measured steps to better figures: how much slower each kind of work is in a model than by itself.

Operators timed alone find their operands in the cache and the allocator warm; in a model they do not. A step's
predicted time is a sum over kinds of work, so measured steps give a factor for each kind, by non-negative least squares
of relative errors with a weak pull towards 1, which decides where steps say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from swinmoe.config import RunConfig
from swinmoe.profiling.plan.cost import KINDS
from swinmoe.profiling.plan.hardware import Figure, Hardware, Link
from swinmoe.profiling.plan.predict import Scene, predict

PULL = 0.1
"""Weight of a factor's distance from 1, beside a step's relative error."""
GROUPS: dict[str, tuple[str, ...]] = {
    "products": ("fp32", "bf16", "fp16", "fp64", "products"),
    "softmax": ("softmax",),
    "elementwise": ("copy", "norm", "activation"),
    "rows": ("route", "rows"),
    "update": ("update",),
}
"""Kinds that share a factor: few, so that few steps decide."""
_NEVER = 1e30


@dataclass(frozen=True)
class Measured:
    """A run's step on so many ranks."""

    run: RunConfig
    world: int
    seconds: float


def refine(hardware: Hardware, steps: Sequence[Measured]) -> tuple[Hardware, dict[str, float]]:
    """`hardware` with every kind of work scaled so that it comes nearest to `steps`, and the factors.

    Exact where nothing overlaps, as on a CPU.
    """
    names = [*GROUPS, "calls", "latency", "bandwidth"]
    parts = np.array([[_share(hardware, name, step) for name in names] for step in steps])
    whole = np.array([predict(step.run, Scene(hardware, step.world)).seconds for step in steps])
    times = np.array([step.seconds for step in steps])
    fixed = whole - parts.sum(1)  # nothing, where all is linear
    pull = PULL * np.eye(len(names))
    design = np.vstack([parts / times[:, None], pull])
    found, _ = nnls(design, np.concatenate([(times - fixed) / times, pull.sum(1)]))
    factors = {name: float(max(value, 1e-3)) for name, value in zip(names, found, strict=True)}
    return _scaled(hardware, factors, len(steps)), factors


def _share(hardware: Hardware, name: str, step: Measured) -> float:
    """Seconds of a step that go into one kind of work."""
    without = _scaled(hardware, {name: 1 / _NEVER}, 0)
    seconds = [predict(step.run, Scene(machine, step.world)).seconds for machine in (hardware, without)]
    return max(0.0, seconds[0] - seconds[1])


def _scaled(hardware: Hardware, factors: dict[str, float], steps: int) -> Hardware:
    """So many times slower at each kind."""
    why = f"; scaled by {steps} measured steps"
    for name, kinds in GROUPS.items():
        if name in factors:
            here = [kind for kind in kinds if getattr(hardware.rates, kind, None) is not None]
            hardware = hardware.scaled(hardware.name, factors[name], *here)
    calls, latency, bandwidth = (factors.get(name, 1.0) for name in ("calls", "latency", "bandwidth"))
    call = Figure(value=hardware.call.value * calls, source=hardware.call.source + why * (calls != 1))

    def link(known: Link) -> Link:
        return _scaled_link(known, latency, bandwidth, why)

    def maybe(known: Link | None) -> Link | None:
        return None if known is None else link(known)

    sharing = tuple(replace(s, inside=maybe(s.inside), shared=maybe(s.shared)) for s in hardware.sharing)
    return replace(
        hardware,
        call=call,
        sharing=sharing,
        inside=link(hardware.inside),
        between=link(hardware.between),
        shared=maybe(hardware.shared),
    )


def _scaled_link(link: Link, latency: float, bandwidth: float, why: str) -> Link:
    return Link(
        latency=Figure(value=link.latency.value * latency, source=link.latency.source + why * (latency != 1)),
        bandwidth=Figure(value=link.bandwidth.value / bandwidth, source=link.bandwidth.source + why * (bandwidth != 1)),
        half_message=link.half_message,
    )


assert {kind for kinds in GROUPS.values() for kind in kinds} >= {*KINDS[1:-1]}
