"""Which rank of a failing job says what, so that the cause is printed once and its consequences do not bury it.

Every failing rank leaves its message at the job's meeting point and waits a moment for the others'. Then

- a message that all ranks have, as of a wrong config, is printed by the lowest of them;
- a message that some ranks have is printed by the lowest of those, with their numbers before it;
- that a collective did not finish is printed only if no rank has a cause to tell: by the lowest, with the numbers of
  the ranks that left no word, because they were killed or hang.

A rank that cannot reach the meeting point speaks for itself, unless rank 0 served it and has ended: then the launcher
or rank 0 has told the cause, and of the consequences one is enough.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # documented, not exported

from swinmoe.errors import DistributedError
from swinmoe.runtime.processes import launched_rank, launched_restart, launched_world, ranks_named

GRACE_SECONDS = 5.0
"""How long to wait for the other ranks' words: they start, and fail, seconds apart."""
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Word:
    """Why a rank ended."""

    message: str
    consequence: bool
    """True for a collective that did not finish: as a rule because of what another rank did."""


def last_word(
    message: str, *, consequence: bool, interrupted: bool = False, grace: float = GRACE_SECONDS
) -> str | None:
    """What this rank should print of its own failure, None if others say it; waits up to `grace` seconds for them.

    Args:
        message: why this rank ends.
        consequence: a collective did not finish.
        interrupted: by the user, whom the first rank answers, at once.
        grace: seconds.
    """
    own = Word(message, consequence)
    try:
        rank, world = launched_rank(), launched_world()
        if world == 1:
            return message
        if interrupted:
            return message if rank == 0 else None
        words = _exchange(own, rank, world, grace)
    except ConnectionRefusedError:
        return message if rank == 1 or not (consequence and dist.is_initialized()) else None
    except (DistributedError, RuntimeError, OSError, ValueError, KeyError):
        return message  # a host that hangs, or a launcher's environment that is wrong or incomplete
    return choose(words, rank, world)


def choose(words: Mapping[int, Word], rank: int, world: int) -> str | None:
    """What `rank` prints, given the words of all ranks that left one."""
    own = words[rank]
    causes = [r for r, word in words.items() if not word.consequence]
    if not causes:
        silent = sorted(set(range(world)) - words.keys())
        if rank != min(words):
            return None
        if not silent:
            return own.message
        state = "it was killed, or hangs" if len(silent) == 1 else "they were killed, or hang"
        return f"{own.message}. No word came from {ranks_named(silent)}: {state}"
    if own.consequence:
        return None
    alike = sorted(r for r in causes if words[r].message == own.message)
    if rank != alike[0]:
        return None
    return own.message if len(alike) == world else f"{ranks_named(alike)}: {own.message}"


def _exchange(own: Word, rank: int, world: int, grace: float) -> dict[int, Word]:
    """Leave `own` at the meeting point, and read what the others left until all have or `grace` has passed."""
    store, hosts = _meeting_point(rank, grace)
    store.set(str(rank), json.dumps(asdict(own)))
    deadline = time.monotonic() + grace
    words: dict[int, Word] = {}
    while True:
        for other in range(world):
            if other not in words and store.check([str(other)]):
                words[other] = Word(**json.loads(store.get(str(other))))
        if len(words) == world or time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    store.add("read", 1)
    while hosts and store.add("read", 0) < len(words) and time.monotonic() < deadline + 1:
        time.sleep(_POLL_SECONDS)  # the others read in this process
    return words


def _meeting_point(rank: int, patience: float) -> tuple[Store, bool]:
    """The job's key-value store where rank 0, or torchrun's agent, serves it; True if it is served by this process."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = rank == 0 and not agents
    if not hosts:
        # Once the job has met, nobody listening means that the host has ended; before, it may yet come.
        _await_listener(address, port, 0.0 if dist.is_initialized() else patience)
    store = TCPStore(
        address, port, is_master=hosts, wait_for_workers=False, multi_tenant=True, timeout=timedelta(seconds=patience)
    )
    # An agent's store outlives a restart, and with it what was said before.
    return PrefixStore(f"swinmoe/last words/{launched_restart() if agents else ''}", store), hosts


def _await_listener(address: str, port: int, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, patience)).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)
