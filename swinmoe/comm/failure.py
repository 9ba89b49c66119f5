"""Collectives that fail say which rank was doing what: a backend names an address at best."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from swinmoe.errors import CollectiveError, SwinMoEError

_TRANSPORT = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|timed out|timeout caused|wait timeout|broken pipe|TCPStore", re.I
)
"""Gloo's failures are plain RuntimeErrors: only their words tell them from others."""


@contextmanager
def naming(what: str, *, amid_other_work: bool = False) -> Iterator[None]:
    """Turn a collective's failure inside the block into a `CollectiveError` that names this rank and `what`.

    On GPUs a collective only starts here and fails where the host next waits for it, or in NCCL's watchdog.

    Args:
        what: the layer and the operation, e.g. `layers.2.blocks.1.mlp: gathering counts`.
        amid_other_work: the block computes too, so let pass what does not look like a transport's failure.
    """
    try:
        yield
    except SwinMoEError:
        raise
    except RuntimeError as error:
        if amid_other_work and not (isinstance(error, dist.DistError) or _TRANSPORT.search(str(error))):
            raise
        rank = dist.get_rank() if dist.is_initialized() else 0
        raise CollectiveError(
            f"rank {rank}: {what} did not finish ({_reason(error)}); another rank stopped, or takes another path "
            "through the model; look at that rank's message first"
        ) from error


def _reason(error: RuntimeError) -> str:
    """The backend's own words, on one line, without source positions, advice and its callback's stack."""
    text = str(error).split("\n\nAt:")[0]
    text = re.sub(r"\[[^\]\s]*\.(cc|cpp|h|hpp):\d+\]\s*", "", text)
    text = re.sub(r"This is typically caused by.*", "", text, flags=re.S)
    text = re.sub(r"Got the following error when running the callback:\s*(\w+Error:\s*)?", "", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(". ") if lines else type(error).__name__
