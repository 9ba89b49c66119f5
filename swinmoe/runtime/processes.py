"""From a launcher's environment to a process group, and back."""

from __future__ import annotations

import os
from datetime import timedelta
from itertools import groupby

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # documented, not exported
from torch.distributed.rendezvous import rendezvous

from swinmoe.errors import DistributedError
from swinmoe.runtime.allocator import keep_freed_memory

TIMEOUT_MINUTES = 10.0
"""A collective that takes longer fails. Long enough for one rank to evaluate or save while others wait."""


def _launched(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise DistributedError(f"environment variable {name}={text!r} is not a number; launchers set it to 0 or more")
    return int(text)


def launched_world() -> int:
    """Processes that the launcher started for this job; 1 without a launcher."""
    return _launched("WORLD_SIZE", 1)


def launched_rank() -> int:
    """This process's number among them, from 0."""
    return _launched("RANK", 0)


def launched_local_world() -> int:
    """Processes that the launcher started for this job on this machine; all of them if it does not say."""
    return _launched("LOCAL_WORLD_SIZE", launched_world())


def launched_restart() -> int:
    """How often the launcher has started this job's processes again."""
    return _launched("TORCHELASTIC_RESTART_COUNT", 0)


def launched_restarts_allowed() -> int:
    """How often the launcher would start this job's processes again after a failure; torchrun's and local.sh's word."""
    return _launched("TORCHELASTIC_MAX_RESTARTS", 0)


def start_processes(
    *, cpu: bool = False, timeout_minutes: float = TIMEOUT_MINUTES, join_minutes: float = TIMEOUT_MINUTES
) -> bool:
    """Join the job's process group: NCCL on GPUs (gloo beside it for host tensors), gloo on CPU.

    Without a launcher or when the group exists, it joins nobody. Every process of the job must call it. Those that stay
    on the CPU keep the memory that they free (`keep_freed_memory`).

    Args:
        cpu: stay on the CPU where there is a GPU.
        timeout_minutes: after so long a collective that does not finish is an error.
        join_minutes: how long to wait for the other processes to come; machines start minutes apart.

    Returns:
        True if this call joined them, so that who called it is to stop them too.

    Raises:
        DistributedError: the launcher's environment is incomplete, there are fewer GPUs than processes on this
            machine, or the others cannot be reached.
    """
    on_gpu = torch.cuda.is_available() and not cpu
    if not on_gpu:
        keep_freed_memory()
    world = launched_world()
    if world == 1 or dist.is_initialized():
        return False
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise DistributedError(
            f"WORLD_SIZE={world} but {', '.join(missing)} is not set; start several processes with launch/local.sh, "
            "torchrun or accelerate launch, or unset WORLD_SIZE for one"
        )
    if on_gpu:
        local, gpus = _launched("LOCAL_RANK", 0), torch.cuda.device_count()
        if local >= gpus:
            raise DistributedError(
                f"process {local} of this machine has no GPU of its own: there are {gpus}; start at most {gpus} "
                "processes here, or run on CPU (launch/local.sh --cpu)"
            )
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    rank, store = launched_rank(), None
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=join_minutes)))
        # All are waited for here: the group's own, shorter timeout counts from its first message.
        store.set(_here(rank), "")
        store.wait([_here(other) for other in range(world)], timedelta(minutes=join_minutes))
        timeout = timedelta(minutes=timeout_minutes)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise DistributedError(
            f"rank {rank} of {world} could not join the others at {address} ({_absent(store, world) or error}); check "
            "that all processes were started, and that address and port are free and reachable"
        ) from error
    return True


def _here(rank: int) -> str:
    return f"swinmoe/here/{rank}"


def _absent(store: Store | None, world: int) -> str:
    """Which ranks did not come to `store`; empty if all did, or nobody knows."""
    try:
        missing = [] if store is None else [r for r in range(world) if not store.check([_here(r)])]
    except RuntimeError:
        return ""
    return f"no sign of {ranks_named(missing)}" if missing else ""


def ranks_named(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`; `ranks` in rising order."""
    runs = []
    for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        members = [rank for _, rank in run]
        runs.append(f"{members[0]}-{members[-1]}" if len(members) > 2 else ", ".join(map(str, members)))
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(runs)}"


def stop_processes() -> None:
    """Leave the process group, if any. Call it at the end of a successful job."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
