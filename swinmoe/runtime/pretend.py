"""A process group of any size in one process, in which nothing travels: for plans and their checks.

Every collective returns at once. A gather finds this rank's own share everywhere, a sum finds it once: shapes are those
of a real group, values are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from swinmoe.errors import DistributedError


@contextmanager
def pretended_processes(world: int, rank: int = 0) -> Iterator[None]:
    """This process as rank `rank` of `world` that are not there; none of it is left when the block ends.

    Raises:
        DistributedError: this process is one of several that a launcher started.
    """
    if dist.is_initialized():
        raise DistributedError("this process already belongs to a job; pretend one in a process started by itself")
    # Part of torch's own testing tools; importing it registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
