"""What a link does, from times of messages: a latency, a bandwidth, and the message size that reaches half of it.

An exchange in r rounds that sends m messages of s bytes from each rank takes

    t = r·α + m·(s + h)/B        bandwidth of a message  B(s) = B·s/(s + h)

α is paid once for each round, h/B once for each message. Exchanges whose messages and rounds are in one proportion (one
number of ranks, say) cannot tell the two apart: then all of it counts as latency, h = 0, and what such an exchange
reaches is B(s) all the same, with h = α·B·r/m (`Link.half`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls


@dataclass(frozen=True)
class Sample:
    """How long one exchange took."""

    messages: float
    """m, that each rank sends, one after another."""
    size: float
    """s, bytes of each."""
    seconds: float
    rounds: int = 1
    """r: 2 for an exchange in two stages."""


@dataclass(frozen=True)
class Link:
    """The fitted link."""

    latency: float
    """α, seconds."""
    bandwidth: float
    """B, bytes per second; infinite where larger messages took no longer."""
    half_message: float
    """h, bytes; 0 where it cannot be told from latency."""
    latency_error: float
    """Standard error over the value, by the scatter of the samples around the fit; 0 for a value of 0."""
    bandwidth_error: float
    """The same of B."""
    errors: tuple[float, ...]
    """(predicted − measured)/measured of each sample."""

    @property
    def typical_error(self) -> float:
        """Median of |errors|."""
        return statistics.median(map(abs, self.errors))

    @property
    def worst_error(self) -> float:
        """Largest of |errors|."""
        return max(map(abs, self.errors))

    def seconds(self, messages: float, size: float, rounds: int = 1) -> float:
        """t; nothing where no message is sent."""
        if messages <= 0:
            return 0.0
        return rounds * self.latency + messages * (size + self.half_message) / self.bandwidth

    def half(self, messages: float, rounds: int = 1) -> float:
        """Bytes of a message at which so many of them reach half of B, latency counted."""
        return self.half_message + self.latency * self.bandwidth * rounds / messages


def fit_link(samples: Sequence[Sample]) -> Link:
    """The link that comes nearest to `samples`: least squares of relative errors, no part negative.

    Relative, because sizes span orders of magnitude: absolute errors of the largest would decide alone.

    Args:
        samples: of at least two sizes.
    """
    measured = np.array([s.seconds for s in samples])
    rounds, messages = (np.array([float(getattr(s, name)) for s in samples]) for name in ("rounds", "messages"))
    volume = messages * np.array([s.size for s in samples])
    assert len({s.size for s in samples}) > 1, "one size of message cannot tell latency from bandwidth"
    separable = len(set((messages / rounds).tolist())) > 1
    columns = [rounds, volume, messages] if separable else [rounds, volume]
    design = np.stack(columns, axis=1) / measured[:, None]
    scale = np.linalg.norm(design, axis=0)  # seconds beside seconds per byte
    found, _ = nnls(design / scale, np.ones(len(samples)))
    errors = design / scale @ found - 1
    spread = _standard_errors(design / scale, found, errors)
    latency, slope = found[:2] / scale[:2]
    each = float(found[2] / scale[2]) if separable else 0.0
    bandwidth = 1 / float(slope) if slope > 0 else float("inf")
    return Link(
        latency=float(latency),
        bandwidth=bandwidth,
        half_message=each * bandwidth if slope > 0 else 0.0,
        latency_error=spread[0],
        bandwidth_error=spread[1],
        errors=tuple(errors.tolist()),
    )


def _standard_errors(
    design: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    found: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    errors: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
) -> list[float]:
    """Of each value, relative to it, as if the others at zero were known to be."""
    free = found > 0
    left = len(design) - int(free.sum())
    relative = np.zeros(len(found))
    if left > 0 and free.any():
        used = design[:, free]
        covariance = np.linalg.pinv(used.T @ used) * float(errors @ errors) / left
        relative[free] = np.sqrt(np.diag(covariance)) / found[free]
    return [float(value) for value in relative]
