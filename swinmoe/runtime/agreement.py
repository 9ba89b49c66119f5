"""All ranks compare what they are about to do, before the first step."""

from __future__ import annotations

from collections import Counter

import torch.distributed as dist

from swinmoe.errors import DistributedError


def agree(value: str, what: str) -> None:
    """Compare `value` over all ranks; a collective call, a no-op on one process.

    Args:
        value: e.g. a config's hash, or a data set's length.
        what: its name in the error.

    Raises:
        DistributedError: on every rank, naming the ranks that differ from the majority.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    values: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(values, value)
    usual, _ = Counter(values).most_common(1)[0]
    others = [f"rank {rank} has {given!r}" for rank, given in enumerate(values) if given != usual]
    if others:
        raise DistributedError(
            f"ranks disagree on the {what}: most have {usual!r}, but {', '.join(others)}; start all processes with "
            "the same config, code and data"
        )
