"""What carrying rows to experts costs on one rank, however they are spread.

Legend: W = ep_size ranks share E experts, in groups of g that gather each other's weights; tokens travel among n = W/g.
r slices of an expert where W > E. N = b·T·K choices on this rank; C slots where the layout is padded; λ rows of the
busiest rank over the mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log, sqrt

from swinmoe.config import MoEConfig, ParallelConfig
from swinmoe.moe.capacity import capacity
from swinmoe.profiling.plan.cost import Cost, backward_of, product
from swinmoe.profiling.plan.exchange import (
    Layout,
    all_gather,
    all_to_all,
    gather_few,
    layout,
    overlapped,
    sum_few,
    two_stage_all_to_all,
)
from swinmoe.profiling.plan.hardware import Hardware
from swinmoe.profiling.plan.work import ExpertLayer, Setting


@dataclass(frozen=True)
class Spread:
    """How one layer's experts and rows lie over ranks: everything that follows from config and shapes."""

    layer: ExpertLayer
    moe: MoEConfig
    """With this layer's own capacity."""
    parallel: ParallelConfig
    at: Setting
    padded: bool
    """Empty slots travel and are computed."""
    world: int
    processes_per_node: int
    imbalance: float | None = None
    """λ; None = what random choices give."""
    recomputed: bool = False
    """Rows travel and experts compute once more in the backward pass."""

    @property
    def slices(self) -> int:
        """r."""
        return max(1, self.parallel.ep_size // self.layer.num_experts)

    @property
    def experts_here(self) -> int:
        """Experts, or slices of one, that this rank holds."""
        return max(1, self.layer.num_experts // self.parallel.ep_size)

    @property
    def params_here(self) -> float:
        """Numbers in this rank's experts. Slices share all but what cannot be cut."""
        return self.layer.num_experts * self.layer.expert_params / self.parallel.ep_size

    @property
    def journey(self) -> Layout:
        """The ranks among which tokens travel."""
        g = self.parallel.weight_group
        return layout(self.parallel.token_group, g, self._node)

    @property
    def _node(self) -> int:
        return self.parallel.local_size or self.processes_per_node

    @property
    def rows(self) -> float:
        """Rows that this rank sends to experts: choices, or slots."""
        layer, policy = self.layer, self.moe.capacity.train
        choices = self.at.images * layer.tokens * layer.top_k
        limit = capacity(policy, self.at.images * layer.tokens, layer.num_experts, layer.top_k)
        if not self.padded:
            return choices if limit is None else min(choices, layer.num_experts * limit)
        if limit is None or policy.kind == "bounded":
            longest = choices * self._random(layer.num_experts, choices)
            return longest if limit is None else min(longest, layer.num_experts * limit)
        return layer.num_experts * limit

    @property
    def busiest(self) -> float:
        """λ of the ranks among which tokens travel; 1 where every rank gets the same number of slots."""
        n = self.parallel.token_group // min(self.slices, self.parallel.token_group)
        if self.padded or n == 1:
            return 1.0
        if self.imbalance is not None:
            return max(1.0, min(self.imbalance, n))
        return self._random(n, self.rows * self.parallel.token_group)

    @staticmethod
    def _random(bins: int, balls: float) -> float:
        """Largest of `bins` equal bins over their mean for so many random balls: 1 + sqrt(2·ln(bins)·bins/balls)."""
        return min(bins, 1 + sqrt(2 * log(bins) * bins / balls)) if bins > 1 and balls else 1.0

    @property
    def rows_computed(self) -> float:
        """Rows that this rank's experts see, on the busiest rank; with slices, every slice sees all of them."""
        joined = min(self.parallel.weight_group, self.slices)
        return self.rows * self.busiest * self.slices / joined

    @property
    def volume(self) -> float:
        """V: bytes of one way, own share included, on the busiest rank."""
        width = 2 if self.parallel.payload == "bf16" else self.at.narrow
        return self.rows_computed * self.layer.dim * width if self.parallel.token_group > 1 else 0.0

    @property
    def experts_met(self) -> int:
        """Experts that this rank's rows meet after weights have been gathered."""
        g = self.parallel.weight_group
        return max(1, self.experts_here * g // min(g, self.slices))

    @property
    def weight_bytes(self) -> float:
        """Of this rank's experts, as they travel."""
        return self.params_here * self.at.wide if self.parallel.weight_group > 1 else 0.0

    def carry(self) -> tuple[Cost, Cost]:
        """Scatter and gather, and changes of order for chunks and slices; forward and backward."""
        layer, choices = self.layer, self.at.images * self.layer.tokens * self.layer.top_k
        own = choices * layer.dim * self.at.narrow
        laid = self.rows * layer.dim * self.at.narrow
        tokens = own / layer.top_k
        if self.at.experts_in_kernel:
            # By kernels of their own, one walk each: rows taken; choices summed. Gradients weighed and multiplied by
            # rows; those of rows summed.
            forward = Cost(rows=laid + 2 * own + tokens, calls=2)
            backward = Cost(rows=own + 2 * laid + 2 * tokens, calls=4)
        else:
            forward = Cost(rows=2 * laid + (4 if layer.top_k == 1 else 5) * own, calls=8)
            backward = Cost(rows=7 * laid + 2 * own, calls=12)
        if self.parallel.token_group > 1 and (self.parallel.chunks > 1 or self.slices > 1):
            changed = Cost(rows=4 * self.volume, calls=4)
            forward, backward = forward + changed, backward + changed
        if self.parallel.weight_group > 1:
            gathered = Cost(copy=2 * self.parallel.weight_group * self.weight_bytes, calls=8)
            forward, backward = forward + gathered, backward + gathered
        return forward, backward

    def experts(self, chunks: int = 1) -> tuple[Cost, Cost]:
        """The experts' MLPs on one of `chunks` equal parts of the rows; forward and backward."""
        layer, at, met = self.layer, self.at, self.experts_met
        by_expert = met >= chunks
        count = met / chunks if by_expert else met
        rows = self.rows_computed / chunks / count
        parts = self.slices // min(self.parallel.weight_group, self.slices)
        first, hidden = layer.fc1_rows / parts, layer.hidden / parts
        size = layer.dim * (first + hidden)
        forward = product(rows, first, layer.dim, at.narrow) + product(rows, layer.dim, hidden, at.narrow)
        backward = backward_of(rows, first, layer.dim, at.narrow) + backward_of(rows, layer.dim, hidden, at.narrow)
        pre = rows * first * at.narrow
        if at.experts_in_kernel:
            # Weights, rows on their way in and out, and pre-activations; one operator for all experts.
            rows_moved, call = 2 * rows * layer.dim * at.narrow, 1 / count
            forward = replace(forward, products=size * at.narrow + rows_moved + pre, calls=call)
            backward = replace(backward, products=2 * size * at.narrow + 1.5 * rows_moved + pre, calls=call)
            return (forward + Cost(activation=pre)) * count, (backward + Cost(activation=pre)) * count
        forward += Cost(activation=2 * pre, calls=1)
        backward += Cost(activation=3 * pre, copy=rows * (first + layer.dim) * at.narrow, calls=3)
        if at.experts_in_blocks:
            # What products find in the cache does not move: hidden units forward, their gradients and those of outputs
            # backward. Inside one node of the graph an operator costs a third of one that autograd records.
            found = (hidden, layer.dim + hidden + 2 * first)
            forward, backward = (
                replace(cost, products=cost.products - rows * width * at.narrow, calls=cost.calls / 3)
                for cost, width in zip((forward, backward), found, strict=True)
            )
        if at.narrow != at.wide:
            cast = Cost(copy=(at.wide + at.narrow) * size, calls=2)
            forward, backward = forward + cast, backward + cast
        return forward * count, backward * count

    def exchange(self, hardware: Hardware, chunks: int = 1) -> float:
        """Seconds of one way of one of `chunks` parts."""
        if self.parallel.token_group == 1:
            return 0.0
        if self.parallel.exchange == "2dh":
            return two_stage_all_to_all(self.journey, self.volume / chunks, hardware, self.at.precision)
        return all_to_all(self.journey, self.volume / chunks, hardware)

    def gather_weights(self, hardware: Hardware) -> float:
        """Seconds of gathering weights, or of bringing their gradients home."""
        g = self.parallel.weight_group
        return all_gather(layout(g, 1, self.processes_per_node), self.weight_bytes, hardware) if g > 1 else 0.0

    def metadata(self, hardware: Hardware) -> float:
        """Seconds of one pass's small messages: counts or slots to the group, statistics to the world."""
        losses = self.moe.losses
        world = layout(self.world, 1, self.processes_per_node)
        seconds = 0.0
        if self.parallel.token_group > 1:
            seconds += gather_few(self.journey, 8 * self.layer.num_experts, hardware)
        if self.world > 1 and losses.batch == "global":
            seconds += sum_few(world, 4 * (2 * self.layer.num_experts + 1), hardware)
        return seconds

    @property
    def meets(self) -> tuple[bool, bool]:
        """Whether ranks wait for each other in this layer, forward and backward."""
        travels = self.parallel.token_group > 1 or self.parallel.weight_group > 1
        return travels or (self.world > 1 and self.moe.losses.batch == "global"), travels

    def seconds(self, hardware: Hardware, processes: int) -> Seconds:
        """Of forward and backward."""
        r = self.parallel.chunks
        busy, waiting, computing = [], self.metadata(hardware), 0.0
        for cost, carried, times in zip(self.experts(r), self.carry(), (1 + self.recomputed, 1), strict=True):
            work = hardware.seconds(cost, self.at.precision, processes)
            transfer = 2 * self.exchange(hardware, r)
            line = overlapped(transfer, work, r, hardware.overlap.value) + self.gather_weights(hardware)
            waiting += times * (line - r * work)
            computing += times * r * work
            busy.append(r * work + hardware.seconds(carried, self.at.precision, processes))
        if self.recomputed:
            busy[1] += busy[0]
        return Seconds(busy[0], busy[1], waiting, computing)


@dataclass(frozen=True)
class Seconds:
    """What one layer takes of a micro-batch."""

    forward: float
    """Of work."""
    backward: float
    """Of work, with what is computed again."""
    waiting: float
    """For transfers, and nothing else."""
    experts: float
    """Of the work, experts alone."""


def needs_padding(dispatcher: str, device: str, kind: str) -> bool:
    """True where the named dispatcher lays experts' rows out with empty slots; `auto` as `moe.dispatchers` decides."""
    if dispatcher == "auto":
        return device != "cpu" and kind == "fixed"
    return dispatcher != "ragged"
