"""Who holds which experts: the ranks of a job as a grid of (replica, expert-parallel rank).

With world 4 and ep_size 2 the ranks 0, 1 share one set of experts and 2, 3 another (a replica of it); 0 and 2 hold the
same experts. Neighbouring ranks share experts, because the all-to-all between them is the heavy traffic and neighbours
usually sit in one node.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from swinmoe.comm.failure import naming
from swinmoe.config import ParallelConfig
from swinmoe.config.checks import divisors
from swinmoe.errors import ConfigError
from swinmoe.runtime import agree, launched_local_world

_groups: WeakKeyDictionary[dist.ProcessGroup, dict[Any, dist.ProcessGroup]] = WeakKeyDictionary()
"""For each job: every partition of its ranks that was asked for, and this rank's group of it."""


@dataclass(frozen=True)
class TokenGroup:
    """Ranks among which tokens travel, seen from this one: an expert group, or every `weight_group`-th rank of it."""

    size: int
    rank: int
    """This rank's number in the group."""
    group: dist.ProcessGroup | None
    """None: of one rank, where nothing travels."""
    local_size: int | None = None
    """2DH: neighbours in the group that share a node; None = flat."""
    inner: dist.ProcessGroup | None = None
    """2DH: the group's ranks in this node."""
    outer: dist.ProcessGroup | None = None
    """2DH: the group's ranks with this one's number in their nodes."""


@dataclass(frozen=True)
class Mesh:
    """This rank's place among all ranks. Copies share the groups: a process group cannot be copied."""

    rank: int = 0
    world: int = 1
    ep_size: int = 1
    """Ranks that share one set of experts."""
    ep_rank: int = 0
    """Place inside that group: this rank holds the experts [ep_rank·e, (ep_rank + 1)·e), e = E/ep_size; where there
    are fewer experts than ranks, slice ep_rank % r of expert ep_rank // r, r = ep_size/E."""
    replica: int = 0
    """Which of the `replicas` sets of experts this rank belongs to."""
    ep_group: dist.ProcessGroup | None = None
    """The ranks that share this rank's set of experts; None when ep_size is 1."""
    replica_group: dist.ProcessGroup | None = None
    """The ranks that hold the same experts as this one; None when there is one replica."""
    config: ParallelConfig = field(default_factory=ParallelConfig)
    """How tokens and weights travel, unless `use_exchange` changes it."""

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

    def slices(self, num_experts: int) -> int:
        """Ranks over which each expert's hidden width is cut."""
        return max(1, self.ep_size // num_experts)

    def group_of(self, partition: list[list[int]], what: str) -> dist.ProcessGroup | None:
        """This rank's group of a partition of all ranks, made at the first call; None for groups of one.

        A collective call: every rank asks for the same partitions in the same order.
        """
        if len(partition[0]) == 1:
            return None
        world = dist.group.WORLD
        assert world is not None
        made = _groups.setdefault(world, {})
        key = (self.config.timeout_minutes, tuple(map(tuple, partition)))
        if key not in made:
            made[key] = _own_group(partition, self.rank, what, timedelta(minutes=self.config.timeout_minutes))
        return made[key]

    def weight_group(self, config: ParallelConfig) -> dist.ProcessGroup | None:
        """The ranks whose expert weights are gathered here; None where weights stay. A collective call."""
        g = config.weight_group
        return self.group_of([list(range(first, first + g)) for first in range(0, self.world, g)], "weights")

    def token_group(self, config: ParallelConfig) -> TokenGroup:
        """The ranks that tokens travel to from here. A collective call.

        Raises:
            ConfigError: 2DH where nodes of the launcher's size do not cut expert groups evenly.
        """
        g, size = config.weight_group, config.token_group
        # Rank of place p in the token group with number i of expert group r: the weight groups stand side by side.
        groups = [[r * self.ep_size + p * g + i for p in range(size)] for r in range(self.replicas) for i in range(g)]
        rank, group = self.ep_rank // g, self.group_of(groups, "tokens")
        if config.exchange == "flat":
            return TokenGroup(size, rank, group)
        local = self._local_size(config) // g
        inner = [ranks[first : first + local] for ranks in groups for first in range(0, size, local)]
        outer = [ranks[place::local] for ranks in groups for place in range(local)]
        return TokenGroup(size, rank, group, local, self.group_of(inner, "in node"), self.group_of(outer, "over nodes"))

    def _local_size(self, config: ParallelConfig) -> int:
        """Ranks of an expert group that share a node."""
        if config.local_size is not None:
            return config.local_size
        launched = launched_local_world()
        agree({"the processes per machine (parallel.local_size sets what 2DH takes for a node)": launched})
        local = min(launched, self.ep_size)
        if launched % local or self.ep_size % local or local % config.weight_group:
            raise ConfigError(
                f"parallel.exchange=2dh: machines of {launched} processes do not cut groups of ep_size={self.ep_size} "
                f"ranks into nodes of whole groups of weight_group={config.weight_group}; set parallel.local_size, or "
                "exchange=flat"
            )
        return local

    def __deepcopy__(self, memo: dict[int, Any]) -> Mesh:
        return self


def make_mesh(config: ParallelConfig, num_experts: int | None = None) -> Mesh:
    """The mesh of this job; a collective call when `torch.distributed` is initialised, else a mesh of one process.

    Args:
        config: how ranks share the work.
        num_experts: experts of a layer, counted globally; None for a dense model.

    Raises:
        ConfigError: `ep_size` does not divide the number of processes, or does not fit the number of experts.
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
    mesh = Mesh(rank=rank, world=world, ep_size=ep, ep_rank=ep_rank, replica=replica, config=config)
    experts = mesh.group_of([list(range(r * ep, (r + 1) * ep)) for r in range(world // ep)], "experts")
    replicas = mesh.group_of([list(range(i, world, ep)) for i in range(ep)], "replicas")
    return replace(mesh, ep_group=experts, replica_group=replicas)


def _own_group(partition: list[list[int]], rank: int, name: str, timeout: timedelta) -> dist.ProcessGroup:
    """The group of `partition` that `rank` is in. Every rank creates every group: `new_group` is collective.

    A group of all ranks is one of its own too: on the world's, exchanges would queue behind DDP's buckets.
    A group does not inherit the job's timeout: torch would give it half an hour.
    """
    own = None
    for ranks in partition:
        with naming(f"forming the group {name} {ranks}"):
            group = dist.new_group(ranks, timeout=timeout, group_desc=f"{name} {ranks}")
        if rank in ranks:
            assert isinstance(group, dist.ProcessGroup)
            own = group
    assert own is not None, (partition, rank)
    return own
