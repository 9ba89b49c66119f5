"""The outcome of holding a mesh against one process."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

TOLERANCE = {"float64": 1e-9, "float32": 1e-3}
"""Largest relative difference that counts as equal. In float32 a rounding may send a token to another expert, so only
float64 proves; the float32 figure says what precision training has."""


@dataclass(frozen=True)
class ParallelProof:
    """How far a mesh is from one process on the same batches. The same on all ranks.

    Differences of gradients are relative to the largest gradient of the model, those of parameters to the largest
    parameter, those of the loss and the norm to themselves; each is the largest over steps.
    """

    processes: int
    spread: str
    """The parallel section, in words."""
    dtype: str
    steps: int
    tolerance: float
    loss: float
    """Of the reference at the last step."""
    loss_difference: float
    norm_difference: float
    """Of the gradients' norm before clipping."""
    gradients: dict[str, float]
    """By parameter, before clipping."""
    parameters: dict[str, float]
    """After the last step, by parameter; those of the moving average as `average/NAME`."""
    clip_factor: float
    """The smallest factor that clipping applied; 1 = never active."""
    largest_clip_factor: float
    """The largest; below 1 = active at every step."""
    routed: int
    """Choices of all tokens in all expert layers and steps."""
    dropped: int
    """Those among them that found no slot."""
    same_counts: bool
    """Choices per expert, before and after drops, are those of the reference."""
    bit_equal: bool
    """What ranks share (dense weights over all, experts over replicas; gradients and weights, each step) is equal
    bit by bit."""
    set_aside: tuple[str, ...]
    """Keys of the config that the proof changed."""

    @property
    def worst_gradient(self) -> tuple[str, float]:
        """Name and difference."""
        return _worst(self.gradients)

    @property
    def worst_parameter(self) -> tuple[str, float]:
        """Name and difference."""
        return _worst(self.parameters)

    @property
    def failures(self) -> tuple[str, ...]:
        """What speaks against the mesh, in words; empty when it is proven."""
        found = []
        figures = {
            "the loss": self.loss_difference,
            "the gradients' norm": self.norm_difference,
            f"the gradient of {self.worst_gradient[0]}": self.worst_gradient[1],
            f"after {self.steps} steps {self.worst_parameter[0]}": self.worst_parameter[1],
        }
        for what, difference in figures.items():
            if not difference <= self.tolerance:  # NaN is no proof either
                found.append(f"{what} is off by {difference:.1e}")
        if not self.same_counts:
            found.append("experts get other numbers of tokens")
        if not self.bit_equal:
            found.append("ranks that share weights hold different ones")
        return tuple(found)

    @property
    def proven(self) -> bool:
        """True if everything is within tolerance, bit-equal where it is shared."""
        return not self.failures

    def as_json(self) -> dict[str, Any]:
        """Plain values, the verdict with them."""
        return {**asdict(self), "failures": list(self.failures), "proven": self.proven}


def _worst(differences: dict[str, float]) -> tuple[str, float]:
    # NaN first: it compares false with everything.
    return max(differences.items(), key=lambda item: (item[1] != item[1], item[1]), default=("", 0.0))
