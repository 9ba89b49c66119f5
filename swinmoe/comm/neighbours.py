"""Rows between processes of one host, through memory that all of them have mapped; for tensors on CPUs.

Gloo sends them over the host's own network stack: four copies, two threads and a few system calls for each message,
which on a CPU compete with the experts. Here the sender copies rows into a buffer that the receivers see, and each
receiver copies its part out: two copies, no system call.

Shapes: G ranks of the group, R exchanges under way at most.

Each rank owns a control block, which it alone writes and the others read:

    failed        it gave an exchange up
    posts (R, ·)  number, buffer, its file, that file's identity and size, bytes of a row; and for each of G ranks at
                  which row of the buffer its rows begin, and how many they are
    taken (G, R)  the number of the exchange of each rank whose rows it has copied out, by number modulo R

and buffers, each for one exchange at a time. A buffer is free again when all its receivers say `taken`. The files have
no name: peers open them by /proc, and nothing is left behind whoever dies and however. A rank that waits looks after
its peer, so that a dead one is noticed at once.

Numbers are written last and read first. That other ranks see such writes in this order is a property of x86, and the
files are one of Linux; elsewhere, and wherever a rank of the group is on another host, Gloo goes on as before, as it
does under `SWINMOE_SHARED_MEMORY=0`.
"""

from __future__ import annotations

import mmap
import os
import platform
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from swinmoe.comm.arrangement import Arrangement

SWITCH = "SWINMOE_SHARED_MEMORY"
UNDER_WAY = 256
"""R. A layer has as many under way as it has chunks."""
SPINS, NAPS = 2000, 20000
"""Looks before giving up the core at each, and before sleeping between them."""
SMALLEST = 1 << 16
_POST = 6  # numbers of a post before its G offsets and G counts


class Link:
    """One group's shared memory, from one rank's side. Made by `link_of`.

    Args:
        rank, size: of the group.
        seconds: after so long a wait is given up.
    """

    def __init__(self, rank: int, size: int, seconds: float) -> None:
        self.rank, self.size, self.seconds = rank, size, seconds
        self._stride = _POST + 2 * size
        self._taken = 1 + UNDER_WAY * self._stride
        self._words = self._taken + size * UNDER_WAY
        self._own = _File(8 * self._words)
        self._controls: list[memoryview] = []
        self._pids: list[int] = []
        self._buffers: list[_File] = []
        self._uses: list[tuple[int, list[int]]] = []
        """For each buffer the last exchange it was for, and its receivers."""
        self._seen: dict[tuple[int, int], _File] = {}
        self._posted: dict[int, tuple[int, list[int]]] = {}
        """By place of the post: its number and receivers."""
        self._next = 1

    def address(self) -> list[int]:
        """What other ranks need to look at this one's control block."""
        return [os.getpid(), self._own.fd]

    def meet(self, addresses: list[list[int]]) -> None:
        """Map the control blocks of all ranks.

        Raises:
            OSError: one cannot be seen from here.
        """
        self._pids = [pid for pid, _ in addresses]
        files = [
            self._own if rank == self.rank else _File(8 * self._words, of=(pid, fd))
            for rank, (pid, fd) in enumerate(addresses)
        ]
        self._controls = [memoryview(file.map).cast("q") for file in files]

    def send(self, rows: Tensor, sends: list[int], receives: list[int], leaving: Arrangement | None = None) -> Transfer:
        """Hand out `rows`, contiguous and in rank order of their receivers or as `leaving` says. All ranks call it in
        the same order."""
        number, self._next = self._next, self._next + 1
        size = rows[:1].nbytes
        receivers = [rank for rank, count in enumerate(sends) if count and size and rank != self.rank]
        pieces = _pieces(sends, leaving)
        if receivers:
            index = self._free_buffer(size * (sum(sends) - sends[self.rank]))
            file, plain = self._buffers[index], _bytes(rows)
            offsets, at = [], 0
            for rank, some in enumerate(pieces):
                offsets.append(at)
                for start, count in () if rank == self.rank else some:
                    file.at(size * at, size * count)[:] = plain[size * start : size * (start + count)]
                    at += count
            self._uses[index] = (number, receivers)
            self._post(number, receivers, [index, file.fd, file.identity, file.size, size, *offsets, *sends])
        own = [rows[start : start + count] for start, count in pieces[self.rank]]
        return Transfer(self, number, own, receives)

    def take(self, number: int, rank: int, parts: list[Tensor]) -> None:
        """Copy what `rank` has for this one into `parts`, one after another, and say so."""
        control, place = self._controls[rank], 1 + number % UNDER_WAY * self._stride
        self._wait(rank, lambda: control[place] == number)
        index, fd, identity, size, row = control[place + 1 : place + _POST]
        start, count = (control[place + _POST + part * self.size + self.rank] for part in (0, 1))
        expected, width = sum(map(len, parts)), parts[0][:1].nbytes
        if (count, row) != (expected, width):
            self._give_up(
                f"rank {rank} of the group sends {count} rows of {row} bytes, where {expected} of {width} were expected"
            )
        file = self._seen.get((rank, index))
        if file is None or file.size < size:
            file = self._seen[rank, index] = self._open(rank, fd, identity, size)
        for part in parts:
            _bytes(part)[:] = file.at(start * row, len(part) * row)
            start += len(part)
        self.skip(number, rank)

    def skip(self, number: int, rank: int) -> None:
        """Say that what `rank` has for this one is not needed any more."""
        self._controls[self.rank][self._taken + rank * UNDER_WAY + number % UNDER_WAY] = number

    def close(self) -> None:
        """Wait a little for those who have not taken what was last sent: it is gone with this process."""
        self.seconds = min(self.seconds, 5.0)
        if self._controls[self.rank][0]:
            return
        with suppress(RuntimeError):
            for number, receivers in self._posted.values():
                self._until_taken(number, receivers)

    def _open(self, rank: int, fd: int, identity: int, size: int) -> _File:
        try:
            file = _File(size, of=(self._pids[rank], fd))
        except (FileNotFoundError, ProcessLookupError):
            self._give_up(self._ended(rank))
        except OSError as error:
            self._give_up(f"failed to recv from rank {rank} of the group: {error}")
        if file.identity != identity:  # it has closed its own, and opened something else
            self._give_up(self._ended(rank))
        return file

    def _post(self, number: int, receivers: list[int], values: list[int]) -> None:
        self._until_taken(*self._posted.get(number % UNDER_WAY, (0, [])))
        own, place = self._controls[self.rank], 1 + number % UNDER_WAY * self._stride
        for at, value in enumerate(values, place + 1):
            own[at] = value
        own[place] = number
        self._posted[number % UNDER_WAY] = (number, receivers)

    def _free_buffer(self, size: int) -> int:
        """Index of a buffer of that size that nobody reads, grown or new if need be; waits only beyond R in use."""
        if len(self._buffers) == UNDER_WAY:
            self._until_taken(*min(self._uses))
        free = [index for index, use in enumerate(self._uses) if self._all_taken(*use)]
        if not free:
            free = [len(self._buffers)]
            self._buffers.append(_File(SMALLEST))
            self._uses.append((0, []))
        index = max(free, key=lambda index: self._buffers[index].size)
        if self._buffers[index].size < size:
            self._buffers[index].grow(1 << (size - 1).bit_length())
        return index

    def _until_taken(self, number: int, receivers: list[int]) -> None:
        for rank in receivers:
            self._wait(rank, partial(self._has_taken, number, rank))

    def _all_taken(self, number: int, receivers: list[int]) -> bool:
        return all(self._has_taken(number, rank) for rank in receivers)

    def _has_taken(self, number: int, rank: int) -> bool:
        return self._controls[rank][self._taken + self.rank * UNDER_WAY + number % UNDER_WAY] >= number

    def _wait(self, rank: int, done: Callable[[], bool]) -> None:
        looks, began, looked_after = 0, 0.0, 0.0
        while not done():
            looks += 1
            if looks < SPINS:
                continue
            now = time.monotonic()
            if looks == SPINS:
                began = looked_after = now
            if now - looked_after > 0.25:
                looked_after = now
                self._look_after(rank, now - began)
            if looks < NAPS:
                os.sched_yield()
            else:
                time.sleep(1e-4)

    def _look_after(self, rank: int, waited: float) -> None:
        if self._controls[rank][0]:
            self._give_up(f"connection closed: rank {rank} of the group gave up")
        if not _alive(self._pids[rank]):
            self._give_up(self._ended(rank))
        if waited > self.seconds:
            self._give_up(f"timed out after {waited:.1f} s of waiting for rank {rank} of the group")

    def _ended(self, rank: int) -> str:
        return f"connection closed: process {self._pids[rank]}, rank {rank} of the group, has ended"

    def _give_up(self, reason: str) -> NoReturn:
        """Worded as Gloo words it, for `naming`; and the others need not wait for this rank."""
        self._controls[self.rank][0] = 1
        raise RuntimeError(reason)


class Transfer:
    """An exchange under way, as `all_to_all_single` returns one.

    Args:
        link: the group's.
        number: of the exchange.
        own: rows that stay here, in pieces.
        receives: rows from each rank.
    """

    def __init__(self, link: Link, number: int, own: list[Tensor], receives: list[int]) -> None:
        self._link, self._number, self._own, self._receives = link, number, own, receives

    def wait(self, out: Tensor, arriving: Arrangement | None = None) -> None:
        """Fill `out`, in rank order of the senders or as `arriving` says."""
        pieces, me, size = _pieces(self._receives, arriving), self._link.rank, self._link.size
        for rank in (*range(me, size), *range(me)):  # own rows first: others may not have come so far
            parts = [out[start : start + count] for start, count in pieces[rank]]
            if rank == me:
                _copy(self._own, parts)
            elif self._receives[rank] and out[:1].nbytes:
                self._link.take(self._number, rank, parts)
        self._receives = []

    def __del__(self) -> None:
        # Begun and never waited for, as when an error passed between: the sender may have its buffer back.
        for rank, count in enumerate(self._receives):
            if count and rank != self._link.rank:
                self._link.skip(self._number, rank)


def _pieces(counts: list[int], arrangement: Arrangement | None) -> Sequence[Sequence[tuple[int, int]]]:
    """By rank, first row and number of rows of each piece."""
    if arrangement is not None:
        return arrangement.pieces
    return [[(end - count, count)] if count else [] for end, count in zip(accumulate(counts), counts, strict=True)]


def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    """Rows from pieces to pieces; on one side they are in one."""
    if len(target) == 1:
        source, target = source, list(target[0].split([len(part) for part in source]))
    elif len(source) == 1:
        source = list(source[0].split([len(part) for part in target]))
    for part, place in zip(source, target, strict=True):
        place.copy_(part)


def _bytes(rows: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The memory of contiguous rows. Not torch's copies: those of a view look like memory that was allocated."""
    return rows.detach().reshape(-1).view(torch.uint8).numpy()


class _File:
    """Memory without a name, or a view of another process's.

    Args:
        size: bytes.
        of: process and number of the file there; None = a new one.
    """

    def __init__(self, size: int, of: tuple[int, int] | None = None) -> None:
        if of is None:
            self.fd = os.memfd_create("swinmoe", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, size)
        else:
            self.fd = os.open(f"/proc/{of[0]}/fd/{of[1]}", os.O_RDWR | os.O_CLOEXEC)
        # Not at the end of the process: others may open it until the very end, and the system closes it then.
        weakref.finalize(self, os.close, self.fd).atexit = False
        found = os.fstat(self.fd)
        if found.st_size < size:  # not the file that was meant: that has gone, and its number to another
            raise FileNotFoundError(self.fd)
        self.size, self.map, self.identity = size, mmap.mmap(self.fd, size), found.st_ino

    def grow(self, size: int) -> None:
        """To `size` bytes; views from before stay what they were."""
        os.ftruncate(self.fd, size)
        self.size, self.map = size, mmap.mmap(self.fd, size)

    def at(self, start: int, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """`count` bytes from `start` on, without a copy."""
        return np.frombuffer(self.map, np.uint8, count, start) if count else np.empty(0, np.uint8)


_links: weakref.WeakKeyDictionary[dist.ProcessGroup, Link | None] = weakref.WeakKeyDictionary()


def link_of(group: dist.ProcessGroup) -> Link | None:
    """The group's shared memory; None where there is none. The first call for a group is a collective one."""
    if group not in _links:
        link = _links[group] = _connect(group)
        if link is not None:
            weakref.finalize(group, link.close)  # at the end of the process too
    return _links[group]


def gather_small(x: Tensor, group: dist.ProcessGroup) -> Tensor | None:
    """`x` of all ranks, (G, *x.shape), where they share memory and it is small; None else, on all ranks alike.

    A few numbers by Gloo cost a wake-up of its threads on every side; here they cost a look.
    """
    size = group.size()
    link = link_of(group) if x.device.type == "cpu" and 0 < size * x.nbytes <= SMALLEST else None
    if link is None:
        return None
    row, once = x.detach().reshape(1, -1), [1] * size
    gathered = row.new_empty((size, row.shape[1]))
    link.send(row.expand(size, -1).contiguous(), once, once).wait(gathered)
    return gathered.view(size, *x.shape)


@contextmanager
def switched_off() -> Iterator[None]:
    """Groups that exchange for the first time inside the block do so by their backend. On all ranks, or none."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


def first_ranks(count: int, *, by_backend: bool = False) -> dist.ProcessGroup | None:
    """A new group of the first `count` processes; None for the others. A collective call of all processes.

    Args:
        count: how many.
        by_backend: rows go by the backend, also where processes share memory.
    """
    with switched_off() if by_backend else nullcontext():
        found = dist.new_group(list(range(count)))
        if not isinstance(found, dist.ProcessGroup) or found.rank() < 0:  # what new_group gives to who is not in it
            return None
        link_of(found)
    return found


def _connect(group: dist.ProcessGroup) -> Link | None:
    if dist.get_backend(group) != "gloo":
        return None
    rank, size = group.rank(), group.size()
    link, here = None, [0] * 3
    if _possible():
        options = group._get_backend(torch.device("cpu")).options
        with suppress(OSError, ValueError):  # refused here: the others are told so by zeros
            host = _host()
            link, here = Link(rank, size, options._timeout.total_seconds()), host
    everyone = _gather([*here, *(link.address() if link else [0, 0])], group)
    if link is None or any(other[:3] != here or not any(other[:3]) for other in everyone):
        return None
    try:
        link.meet([other[3:] for other in everyone])
        met = 1
    except OSError:  # another user's process, or one behind a wall
        met = 0
    return link if all(flag for (flag,) in _gather([met], group)) else None


def _gather(values: list[int], group: dist.ProcessGroup) -> list[list[int]]:
    own = torch.tensor(values, device="cpu")
    everyone = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(everyone, own, group=group)
    return [each.tolist() for each in everyone]


def _possible() -> bool:
    ordered = platform.machine().lower() in ("x86_64", "amd64")
    return ordered and hasattr(os, "memfd_create") and os.environ.get(SWITCH, "1") != "0"


def _host() -> list[int]:
    """Equal for processes that can see each other's memory and would reach each other without leaving the machine."""
    boot = int(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")[:15], 16)
    return [boot, *(os.stat(f"/proc/self/ns/{space}").st_ino for space in ("net", "pid"))]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
