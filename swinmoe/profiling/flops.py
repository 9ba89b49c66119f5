"""Three counts of an expert layer's matrix products: what tokens got, what the machine did, what a dense MLP would do.

T tokens, D width, F hidden width of an expert, E experts, K choices, C slots. 2 FLOPs per multiply-add, elementwise
work free, as torch's `FlopCounterMode` has it. All counts are over all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """Choices of a step, over all ranks."""

    routed: int
    """T·K."""
    kept: int
    """Of these, not dropped."""
    computed: int
    """Rows that experts multiplied, empty slots among them; of a sliced expert, every slice a part of one."""

    @property
    def dropped(self) -> float:
        """Share of choices that capacity cut off."""
        return 1 - self.kept / self.routed if self.routed else 0.0

    @property
    def padding(self) -> float:
        """Share of computed rows that carry no token."""
        return 1 - self.kept / self.computed if self.computed else 0.0


@dataclass(frozen=True)
class LayerFlops:
    """One step of a layer."""

    model: int
    """Router, and experts for the choices that were kept."""
    hardware: int
    """Router, experts for all computed rows, and what the dispatcher multiplies (only `gshard` does)."""
    dense_equivalent: int
    """A dense MLP of width K·F on all tokens."""

    def as_json(self) -> dict[str, int]:
        """The three by name."""
        return {"model": self.model, "hardware": self.hardware, "dense_equivalent": self.dense_equivalent}


def mlp_flops(rows: int, dim: int, hidden: int, *, matrices: int = 2) -> int:
    """Forward products of a two-layer MLP over `rows` rows; SwiGLU has three matrices of D·F."""
    return 2 * matrices * rows * dim * hidden


def layer_flops(
    rows: Rows, *, tokens: int, dim: int, hidden: int, experts: int, slots: int | None, backward: bool, masks: bool
) -> LayerFlops:
    """Counts of a step with a linear router.

    Args:
        rows: of the step.
        tokens: T, over all ranks.
        dim: D.
        hidden: F.
        experts: E.
        slots: C; None in the ragged layout.
        backward: with the backward pass: twice the forward, once for each factor.
        masks: the dispatcher multiplies with one-hot masks (`gshard`).
    """
    passes = 3 if backward else 1
    router = 2 * tokens * dim * experts
    carried = 0
    if masks and slots is not None:
        top_k = rows.routed // tokens if tokens else 0
        made = top_k if top_k > 1 else 0  # with one choice a mask is an elementwise product
        whole = 2 * tokens * experts * slots
        # Making a mask, applying it: out and back. Backward: rows' and tokens' gradients, and of the gates' mask too.
        carried = 2 * whole * (made + dim) + (whole * (3 * dim + made) if backward else 0)
    return LayerFlops(
        model=passes * (router + mlp_flops(rows.kept, dim, hidden)),
        hardware=passes * (router + mlp_flops(rows.computed, dim, hidden)) + carried,
        dense_equivalent=passes * mlp_flops(rows.routed, dim, hidden),
    )
