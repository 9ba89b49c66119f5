"""A process group of any size in one process, in which nothing travels: for plans and their checks.

Every collective returns at once. A gather finds this rank's own share everywhere, a sum finds it once: shapes are those
of a real group, values are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
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


@contextmanager
def shards_without_storage() -> Iterator[None]:
    """Within it FSDP2 takes models on the meta device, where a real step would find nothing to compute with.

    It wants to see such models filled before they train, and asks the device for streams, in which there would be
    nothing to wait for; a CPU's, which do nothing, stand in for them.

    Raises:
        DistributedError: this torch's FSDP2 is built in another way.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as built

    group = getattr(built, "FSDPParamGroup", None)
    if hasattr(torch, "meta") or not hasattr(group, "_validate_no_meta_params"):
        raise DistributedError(
            f"torch {torch.__version__} builds FSDP2 in another way than the dry run of parallel.shard_dense knows; "
            "use torch 2.14 for it, or set parallel.shard_dense=false"
        )
    streams = SimpleNamespace(**{**vars(torch.cpu), "current_device": lambda: 0})
    with (
        patch.object(torch, "meta", streams, create=True),
        patch.object(group, "_validate_no_meta_params", lambda self: None),
    ):
        yield
