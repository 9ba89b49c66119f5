"""How long collectives take: messages whose size says how much of a link they reach, inside nodes and between them.

Legend: n ranks of a group, q of them in each node; V bytes that a rank holds for all ranks of the group, its own
included; s = V/n bytes of one message. Every rank sends and receives as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from swinmoe.comm.neighbours import SMALLEST
from swinmoe.profiling.plan.hardware import Hardware, Link


@dataclass(frozen=True)
class Layout:
    """How a group lies on nodes."""

    ranks: int
    """n."""
    per_node: int
    """q; it divides n, or is n."""

    @property
    def nodes(self) -> int:
        """Nodes that the group touches."""
        return -(-self.ranks // self.per_node)


def layout(size: int, stride: int, processes_per_node: int) -> Layout:
    """`size` ranks, every `stride`-th, on nodes of so many ranks: as many in each node as fit."""
    return Layout(size, max(1, min(size, processes_per_node // stride)))


def all_to_all(at: Layout, volume: float, hardware: Hardware) -> float:
    """Flat: every rank to every other in one message, both links at the same time.

    t = α_i + α_x + max((q - 1)·s/B_i(s), (n - q)·s/B_x(s)). A group within one node may share memory.
    """
    if at.ranks == 1:
        return 0.0
    size = volume / at.ranks
    if at.nodes == 1:
        return hardware.neighbours.seconds(at.ranks - 1, size)
    inside = hardware.inside.seconds(at.per_node - 1, size)
    between = hardware.between.seconds(at.ranks - at.per_node, size)
    latencies = [
        link.latency.value
        for link, messages in ((hardware.inside, at.per_node - 1), (hardware.between, at.ranks - at.per_node))
        if messages > 0
    ]
    # each `seconds` holds its own latency: the larger transfer, and both latencies once
    transfers = (
        inside - hardware.inside.latency.value * (at.per_node > 1),
        between - hardware.between.latency.value * (at.nodes > 1),
    )
    return sum(latencies) + max(transfers)


def two_stage_all_to_all(at: Layout, volume: float, hardware: Hardware, precision: str) -> float:
    """2DH (Hwang et al. 2023, §3.4): inside the node with messages of V/q, then between nodes with messages of V/k.

    Rows are put in another order before each stage, which the copies of 4·V bytes stand for.
    """
    if at.nodes == 1 or at.per_node == 1:
        return all_to_all(at, volume, hardware)
    inside = hardware.neighbours.seconds(at.per_node - 1, volume / at.per_node)
    between = hardware.between.seconds(at.nodes - 1, volume / at.nodes)
    return inside + between + 4 * volume / hardware.rates.rows.value


def all_gather(at: Layout, share: float, hardware: Hardware) -> float:
    """A share of so many bytes from every rank to every other; a reduce-scatter is its mirror and takes as long.

    A ring: n - 1 rounds, in each of which every rank passes a share on.
    """
    if at.ranks == 1:
        return 0.0
    link, rate = _path(at, hardware)
    rounds = at.ranks - 1
    # Rounds follow each other without a gap on a GPU; on a CPU each is a message of its own
    waits = rounds if hardware.device == "cpu" else ceil(log2(at.ranks))
    return waits * link.latency.value + rounds * (share + link.half_message.value * rate / link.bandwidth.value) / rate


def all_reduce(at: Layout, volume: float, hardware: Hardware) -> float:
    """A sum of `volume` bytes over the group: reduce-scatter and gather around a ring, or up and down a tree, whose
    time does not grow with the ranks but by the logarithm of their latencies; libraries on a CPU know the ring alone.
    """
    if at.ranks == 1:
        return 0.0
    ring = 2 * all_gather(at, volume / at.ranks, hardware)
    if hardware.device == "cpu":
        return ring
    link, rate = _path(at, hardware)
    tree = 2 * (ceil(log2(at.ranks)) * link.latency.value + (volume + link.half_message.value) / rate)
    return min(ring, tree)


def gather_few(at: Layout, share: float, hardware: Hardware) -> float:
    """A gather of a few numbers from every rank: where ranks of one node share memory, in one round through that."""
    if _is_few(at, share, hardware):
        return hardware.neighbours.seconds(at.ranks - 1, share)
    return all_gather(at, share, hardware)


def sum_few(at: Layout, volume: float, hardware: Hardware) -> float:
    """A sum of a few numbers: a gather, where that goes through shared memory, else an all-reduce."""
    return gather_few(at, volume, hardware) if _is_few(at, volume, hardware) else all_reduce(at, volume, hardware)


def _is_few(at: Layout, share: float, hardware: Hardware) -> bool:
    """Whether `comm` takes memory for it."""
    return at.ranks > 1 and at.nodes == 1 and hardware.shared is not None and at.ranks * share <= SMALLEST


def _path(at: Layout, hardware: Hardware) -> tuple[Link, float]:
    """The link that limits a ring, and its bytes per second: between nodes, the adapters of all its ranks in one."""
    if at.nodes == 1:
        return hardware.inside, hardware.inside.bandwidth.value
    rate = at.per_node * hardware.between.bandwidth.value
    return hardware.between, min(rate, hardware.inside.bandwidth.value) if at.per_node > 1 else rate


def overlapped(transfer: float, work: float, chunks: int, hidden: float) -> float:
    """Out, experts and back in so many chunks, while transfers hide a share `hidden` of what could hide at best.

    Args:
        transfer: seconds of one chunk's two journeys.
        work: seconds of one chunk's experts.
        chunks: r; t = r = 1 has nothing to hide behind.
        hidden: 0 = everything waits for everything, 1 = the longer of both counts.
    """
    steady = hidden * max(transfer, work) + (1 - hidden) * (transfer + work)
    return transfer + work + (chunks - 1) * steady
