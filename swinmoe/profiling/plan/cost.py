"""What work consists of, counted in the units that a machine has rates for.

A time is a sum of counts, each divided by its rate: time = Σ_k count_k/rate_k. Where products and memory traffic
overlap that is an upper bound; in exchange it is linear in the machine's constants, so that they follow from any set of
measured times by non-negative least squares, and no time ever falls when work is added.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod


@dataclass(frozen=True)
class Cost:
    """Counts of some work on one rank. All but `flops` and `calls` are bytes read and written."""

    flops: float = 0.0
    """Of matrix products, 2 per multiply-add."""
    products: float = 0.0
    """Operands and results of matrix products."""
    copy: float = 0.0
    """Copies, additions, scaling, casts; sums of gradients."""
    norm: float = 0.0
    """Layer norms, normalised queries and keys."""
    softmax: float = 0.0
    """Attention weights."""
    activation: float = 0.0
    """GELU, ReLU, SwiGLU."""
    route: float = 0.0
    """Scores, choices, queues and statistics of expert layers."""
    rows: float = 0.0
    """Rows gathered and scattered."""
    update: float = 0.0
    """The optimiser's step, the norm of gradients and their clipping."""
    calls: float = 0.0
    """Operators started."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self.counts, other.counts, strict=True)))

    def __mul__(self, times: float) -> Cost:
        return Cost(*(times * a for a in self.counts))

    @property
    def counts(self) -> tuple[float, ...]:
        """In the order of `KINDS`."""
        return tuple(getattr(self, kind) for kind in KINDS)


KINDS = tuple(field.name for field in fields(Cost))


def product(m: float, n: float, k: float, width: float, *, batch: float = 1, result_width: float | None = None) -> Cost:
    """`batch` products (m, k)·(k, n) of elements of `width` bytes."""
    out = width if result_width is None else result_width
    return Cost(flops=2 * batch * m * n * k, products=batch * (width * (m * k + k * n) + out * m * n), calls=1)


def backward_of(m: float, n: float, k: float, width: float, *, batch: float = 1, leaf: bool = False) -> Cost:
    """Both gradients of `product`; only that of the second factor where the first is a `leaf` without gradient."""
    second = product(k, n, m, width, batch=batch)
    return second if leaf else second + product(m, k, n, width, batch=batch)


def elements(*sizes: float) -> float:
    """Product of sizes."""
    return float(prod(sizes))
