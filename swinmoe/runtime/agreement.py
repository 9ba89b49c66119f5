"""All ranks compare what they are about to do, before the first step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from swinmoe.comm.failure import naming
from swinmoe.errors import DistributedError
from swinmoe.runtime.processes import ranks_named

Value = TypeVar("Value")

UNKNOWN = object()
"""A fact that this rank could not find out, such as the commit where git did not answer: it differs from nothing."""
_ABSENT = "none"
"""Of a rank that has no such fact. Values are shown in quotes."""
_LISTED = 6
"""Differences that an error lists; it counts the others."""


def agree(facts: Mapping[str, object]) -> None:
    """Compare `facts` over all ranks; a collective call, a no-op on one process.

    Args:
        facts: what -> value, e.g. `{"length of the training data": 1797}`. Values are compared, and shown, as text;
            ranks whose value is `UNKNOWN` are left out.

    Raises:
        DistributedError: the same on every rank: which fact, which ranks have what, and which ranks differ from most.
        CollectiveError: a rank did not take part.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    given: list[dict[str, str | None]] = [{}] * dist.get_world_size()
    with naming("comparing config, code and data before the first step"):
        dist.all_gather_object(given, {what: _shown(value) for what, value in facts.items()})
    names = list(dict.fromkeys(what for rank_facts in given for what in rank_facts))
    differing = [text for what in names if (text := _difference(what, [g.get(what, _ABSENT) for g in given]))]
    if differing:
        more = f"; and {len(differing) - _LISTED} more" if len(differing) > _LISTED else ""
        raise DistributedError(
            f"ranks disagree on {'; on '.join(differing[:_LISTED])}{more}; start all processes with the same config, "
            "code and data"
        )


def from_first(value: Value) -> Value:
    """Rank 0's `value` on every rank; a collective call, `value` itself on one process.

    Raises:
        CollectiveError: a rank did not take part.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    told = [value]
    with naming("hearing from rank 0"):
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    return told[0]


def from_all(value: Value) -> list[Value]:
    """Every rank's `value`, in order of rank, on all ranks; a collective call, `[value]` on one process.

    Raises:
        CollectiveError: a rank did not take part.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    told = [value] * dist.get_world_size()
    with naming("hearing from all ranks"):
        dist.all_gather_object(told, value)
    return told


def _shown(value: object) -> str | None:
    return None if value is UNKNOWN else repr(str(value))


def _difference(what: str, values: list[str | None]) -> str | None:
    """`the config's a.b: ranks 0-2 have '1', but rank 3 has '2'`, the largest group first; None if all agree.

    A value of None is unknown.
    """
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, value in enumerate(values):
        if value is not None:
            ranks[value].append(rank)
    if len(ranks) < 2:
        return None
    groups = sorted(ranks.items(), key=lambda item: -len(item[1]))
    said = [f"{ranks_named(members)} {'has' if len(members) == 1 else 'have'} {value}" for value, members in groups]
    return f"{what}: {said[0]}, but {', '.join(said[1:])}"
