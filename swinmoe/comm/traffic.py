"""What this rank sends to others: every message of `swinmoe.comm`, counted while someone listens.

    with listen() as sent:
        y, _ = layer(x)
    sum(message.bytes for message in sent)

Bytes are those that leave this rank for other ranks, by the collective's own arithmetic: rows that stay do not count; a
gather sends a share to each of the G - 1 others; a reduce-scatter sends each of them its share; an all-reduce counts as
a reduce-scatter and a gather, 2·(G - 1)/G of its tensor. What a backend adds to that is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Message:
    """One collective call."""

    operation: str
    """`all_to_all`, `all_gather`, `reduce_scatter` or `all_reduce`."""
    what: str
    """What it was for."""
    ranks: int
    """Ranks in its group."""
    bytes: float
    """Sent to other ranks."""


_listeners: list[list[Message]] = []


@contextmanager
def listen() -> Iterator[list[Message]]:
    """A list that fills with this process's messages, forward and backward, until the block ends."""
    heard: list[Message] = []
    _listeners.append(heard)
    try:
        yield heard
    finally:
        # By identity: lists that heard the same are equal.
        _listeners[:] = [other for other in _listeners if other is not heard]


def note_all_reduce(tensor: Tensor, group: dist.ProcessGroup | None, what: str) -> None:
    """Tell the listeners of an all-reduce of `tensor` over `group`; None = all ranks."""
    if not _listeners:
        return
    ranks = dist.get_world_size(group)
    note("all_reduce", what, ranks, 2 * tensor.nbytes * (ranks - 1) / ranks)


def note(operation: str, what: str, ranks: int, sent: float) -> None:
    """Tell the listeners; costs nothing where there is none."""
    for heard in _listeners:
        heard.append(Message(operation, what, ranks, sent))
