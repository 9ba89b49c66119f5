"""Who holds which experts: the ranks of a job as a grid of (replica, expert-parallel rank).

With world 4 and ep_size 2 the ranks 0, 1 share one set of experts and 2, 3 another (a replica of it); 0 and 2 hold the
same experts. Neighbouring ranks share experts, because the all-to-all between them is the heavy traffic and neighbours
usually sit in one node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from swinmoe.config import ParallelConfig
from swinmoe.config.checks import divisors
from swinmoe.errors import ConfigError


@dataclass(frozen=True)
class Mesh:
    """This rank's place among all ranks. Copies share the groups: a process group cannot be copied."""

    rank: int = 0
    world: int = 1
    ep_size: int = 1
    """Ranks that share one set of experts."""
    ep_rank: int = 0
    """Place inside that group: this rank holds the experts [ep_rank·e, (ep_rank + 1)·e), e = E/ep_size."""
    replica: int = 0
    """Which of the `replicas` sets of experts this rank belongs to."""
    ep_group: dist.ProcessGroup | None = None
    """The ranks that share this rank's set of experts; None when ep_size is 1."""
    replica_group: dist.ProcessGroup | None = None
    """The ranks that hold the same experts as this one; None when there is one replica."""

    @property
    def replicas(self) -> int:
        """Complete sets of experts in the job."""
        return self.world // self.ep_size

    @property
    def world_group(self) -> dist.ProcessGroup | None:
        """All ranks; None when this process is alone."""
        return dist.group.WORLD if self.world > 1 else None

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and talks to the user."""
        return self.rank == 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Mesh:
        return self


def make_mesh(config: ParallelConfig, num_experts: int | None = None) -> Mesh:
    """The mesh of this job; a collective call when `torch.distributed` is initialised, else a mesh of one process.

    Args:
        config: how ranks share the work.
        num_experts: experts of a layer, counted globally; None for a dense model.

    Raises:
        ConfigError: `ep_size` does not divide the number of processes or of experts.
    """
    launched = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if launched else (0, 1)
    ep = config.ep_size
    if num_experts is not None:
        config.check_experts(num_experts, "the number of experts")
    if world % ep:
        fitting = [d for d in divisors(world) if num_experts is None or num_experts % d == 0 or d % num_experts == 0]
        raise ConfigError(
            f"parallel.ep_size={ep} does not divide the number of processes {world}; use one of {fitting}, or start "
            f"a multiple of {ep} processes (launch/local.sh --processes {ep} ...)"
        )
    replica, ep_rank = divmod(rank, ep)
    return Mesh(
        rank=rank,
        world=world,
        ep_size=ep,
        ep_rank=ep_rank,
        replica=replica,
        ep_group=_own_group([list(range(r * ep, (r + 1) * ep)) for r in range(world // ep)], rank, "experts"),
        replica_group=_own_group([list(range(i, world, ep)) for i in range(ep)], rank, "replicas"),
    )


def _own_group(partition: list[list[int]], rank: int, name: str) -> dist.ProcessGroup | None:
    """The group of `partition` that `rank` is in. Every rank creates every group: `new_group` is collective."""
    if len(partition[0]) == 1:
        return None
    if len(partition) == 1:
        return dist.group.WORLD
    own = None
    for ranks in partition:
        group = dist.new_group(ranks, group_desc=f"{name} {ranks}")
        if rank in ranks:
            assert isinstance(group, dist.ProcessGroup)
            own = group
    return own
