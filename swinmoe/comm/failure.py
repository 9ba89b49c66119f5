"""Collectives that fail say which rank was doing what: a backend names an address at best."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from swinmoe.errors import CollectiveError, SwinMoEError

_TRANSPORT = re.compile(
    r"(?<!ProcessGroup)(gloo|nccl)|connection (closed|reset|refused|aborted)|timed out|timeout|broken pipe|unreachable"
    r"|no route to host|unexpected EOF|failed to (recv|send)|TCPStore",
    re.I,
)
"""Gloo's failures are plain RuntimeErrors: only their words tell them from others. A group's own complaint about what
it was given begins with `ProcessGroupGloo`; what went wrong on the way names a file of Gloo."""


@contextmanager
def naming(what: str, *, amid_other_work: bool = False) -> Iterator[None]:
    """Turn a collective's failure inside the block into a `CollectiveError` that names this rank and `what`.

    Only a transport's failure is put down to another rank. What this rank got wrong by itself, such as a dtype that the
    backend does not know, stays a RuntimeError, and says `failed`.

    On GPUs a collective only starts here. NCCL's watchdog then ends the process by a message of its own, which has no
    layer; never tried on one.

    Args:
        what: the layer and the operation, e.g. `layers.2.blocks.1.mlp: gathering counts`.
        amid_other_work: the block computes too, so let pass, as it is, what does not look like a transport's failure.
    """
    try:
        yield
    except SwinMoEError:
        raise
    except RuntimeError as error:
        others = isinstance(error, dist.DistError) or _TRANSPORT.search(str(error)) is not None
        if not others and amid_other_work:
            raise
        rank = dist.get_rank() if dist.is_initialized() else 0
        if not others:
            raise RuntimeError(f"rank {rank}: {what} failed ({_reason(error)})") from error
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
