"""Ranks tell each other how their part went, so that they go on, or fail, together."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

from swinmoe.comm.failure import naming
from swinmoe.errors import CheckpointError, DamagedError
from swinmoe.parallel import Mesh

Result = TypeVar("Result")


def share(mesh: Mesh, error: CheckpointError | None, result: Result) -> list[Result]:
    """Every rank's `result`, if none has an `error`; else the same error on all ranks. A collective call.

    Raises:
        CheckpointError: that of the lowest rank that has one, a `DamagedError` only if all errors are.
        CollectiveError: a rank did not take part.
    """
    if mesh.world == 1:
        if error is not None:
            raise error
        return [result]
    told: list[tuple[bool, str | None, Result]] = [(False, None, result)] * mesh.world
    own = (isinstance(error, DamagedError), None if error is None else str(error), result)
    with naming("agreeing on how a checkpoint went"):
        dist.all_gather_object(told, own)
    errors = [(damaged, said) for damaged, said, _ in told if said is not None]
    if errors:
        kind = DamagedError if all(damaged for damaged, _ in errors) else CheckpointError
        raise kind(next(said for damaged, said in errors if damaged == (kind is DamagedError))) from error
    return [found for _, _, found in told]
