"""The vocabulary of the sparse house: frozen values that the rooms of `swinmoe.moe` hand to each other.

Shapes: T tokens on this rank, D width, E experts counted globally, e experts held here, K choices per token,
C capacity (slots per expert per source rank), F hidden width, N kept (token, choice) rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.utils._pytree import register_dataclass


@dataclass(frozen=True)
class Routing:
    """What a router decided, before any capacity is applied."""

    expert_ids: Tensor
    """(T, K) int64, best choice first."""
    gates: Tensor
    """(T, K) combine weights of the choices, differentiable, normalised if the config says so."""
    logits: Tensor
    """(T, E) scores before noise and bias, in the gate's dtype (float32 or wider)."""
    noisy_logits: Tensor
    """(T, E) logits + noise; `logits` itself where there is no noise."""
    probs: Tensor
    """(T, E) softmax or sigmoid of the noisy logits, the source of `gates`."""
    noise_std: float
    """Standard deviation of the noise added (0.0 in evaluation)."""
    passed: Tensor | None = None
    """(T, D), the tokens once more: to the gradient of who carries these the router adds its own in one walk. None:
    there is nothing to gain by it."""
    passed_from: Tensor | None = None
    """The very tokens that `passed` stands for. A router of one's own may have scored others than the layer's."""

    def to_carry(self, tokens: Tensor) -> Tensor:
        """`tokens`, which were routed, as they had best be carried: the same numbers, with the same gradient."""
        return tokens if self.passed is None else self.passed


class Queues(NamedTuple):
    """Every choice's place in its expert's queue."""

    slot: Tensor
    """(T, K) int64 place in the queue of the chosen expert, from 0."""
    kept: Tensor | None
    """(T, K) bool: the place is below the capacity; None = all are, known without looking."""
    routed: Tensor
    """(E,) int64 length of each queue."""
    counts: Tensor
    """(E,) int64 its kept part."""


@dataclass(frozen=True)
class DispatchPlan:
    """Which choice sits in which row of the layout.

    M rows: ragged, the N kept choices sorted by (expert, slot); padded, E·slots, expert by expert, some of them empty.
    """

    row: Tensor
    """(M,) int64 index t·K + k of the choice in each row; -1 in the empty rows of the padded layout."""
    position: Tensor
    """(T, K) int64 row of each choice; 0 where it was dropped."""
    slot: Tensor
    """(T, K) int64 place of each choice in its expert's queue, counted before capacity cuts."""
    kept: Tensor | None
    """(T, K) bool: slot < capacity; None = all are kept, known without looking."""
    counts: Tensor
    """(E,) int64 rows kept per expert."""
    routed: Tensor
    """(E,) int64 choices per expert before drops."""
    slots: int | None
    """Padded layout: rows per expert."""
    native: bool = True
    """Whether rows may be carried by our kernels in C++, where the numbers allow."""


@dataclass(frozen=True)
class RoutingStats:
    """What one expert layer reports of one forward pass. Sums, not means, so that micro-batches and ranks add up."""

    routed: Tensor
    """(E,) int64 choices per expert before drops."""
    kept: Tensor
    """(E,) int64 choices per expert after drops."""
    tokens: Tensor
    """() int64 tokens seen."""
    entropy_sum: Tensor
    """() float32, detached: sum over tokens of the entropy (nats) of their normalised expert probabilities."""
    losses: dict[str, Tensor]
    """Each computed auxiliary loss, unweighted, detached."""
    loss: Tensor
    """() weighted sum of the losses, differentiable."""
    expert_ids: Tensor
    """(T, K) int64, -1 where the choice was dropped."""


@dataclass(frozen=True)
class ExpertRows:
    """Rows on their way to experts: ragged (N, D) sorted by global expert, or padded (E, C, D)."""

    rows: Tensor
    counts: Tensor
    """(E,) int64 rows per global expert (padded layout: those that carry a token)."""


@dataclass(frozen=True)
class ExpertWeights:
    """Stacked expert weights: any number of experts, any slice of the hidden width; matrices as in `nn.Linear`."""

    fc1: Tensor
    """(e, F, D); SwiGLU (e, 2F, D) with value and gate rows interleaved, so that any slice of F is contiguous."""
    b1: Tensor | None
    """(e, F) or (e, 2F)."""
    fc2: Tensor
    """(e, D, F)."""
    b2: Tensor | None
    """(e, D); on slices of F a share of it, such that the slices' shares add up."""


ExpertFn = Callable[[Tensor, "Tensor | None", ExpertWeights], Tensor]
"""(rows, segments, weights) -> rows. Ragged: rows (N, D) ordered (source, local expert) and segments (S, e) int64 on
the host, from our exchange with S = 1; padded: rows (e, n, D) and None. Pure; additive over slices of F; any e >= 1 and
any empty segment; every weight takes part in the graph whatever the counts are, so that all ranks build one graph and
get every gradient."""


@dataclass(frozen=True)
class Route:
    """Metadata of one exchange, free of gradients."""

    matrix: Tensor | None
    """(W, E) int64 on the host: rows that each rank of the group sends to each expert; None in the padded layout."""
    slots: int | None
    """Padded layout: rows per expert and source, agreed between ranks."""
    rows: int | None = None
    """Ragged layout: kept rows of this rank, a by-product of the host copy; None = not known without another."""
    plan: Any = None
    """What the execution has derived for its own use, so that recomputation need not derive it again."""


class ExpertExecution(Protocol):
    """The one seam: how rows meet experts. `LocalExecution` lives in `moe`; `parallel` supplies the rest.

    It owns no parameters, so a checkpoint never depends on it.
    """

    def prepare(self, counts: Tensor, slots: int | None) -> Route:
        """All metadata traffic: at most one collective and one host copy. Never recomputed."""
        ...

    def run(self, x: ExpertRows, route: Route, w: ExpertWeights, fn: ExpertFn) -> Tensor:
        """Expert outputs in the order and shape of `x.rows`; data collectives only."""
        ...

    def reduce(self, stats: Tensor) -> Tensor:
        """Sum of `stats` over ranks that share a batch; its backward is the identity (gradients are summed later)."""
        ...


for _kind in (RoutingStats,):
    register_dataclass(_kind)
