"""Errors that users can act on: each says what was given, what is allowed and what to do.

The command line turns any `SwinMoEError` into one message on stderr and exit status 2 (a `CollectiveError`, which is
no fault of the command, 1; a `Preempted` job, 75); a traceback appears only under `--debug`. Programming mistakes stay
ordinary `AssertionError`/`TypeError`.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SwinMoEError(Exception):
    """Base of every error meant for a user's eyes."""


class ConfigError(SwinMoEError, ValueError):
    """A configuration that cannot work, or a key that does not exist."""


class RoutingError(SwinMoEError, ValueError):
    """Expert-layer inputs or settings that contradict each other."""


class CheckpointError(SwinMoEError, RuntimeError):
    """A checkpoint that is missing, incomplete, damaged or does not fit."""


class DamagedError(CheckpointError):
    """Files are not what was written: cut off, changed, missing. An earlier checkpoint may still be whole."""


class DataError(SwinMoEError, RuntimeError):
    """A data set that is missing or malformed; says where it was sought and how to get it."""


class BackendUnavailableError(SwinMoEError, RuntimeError):
    """An optional component (Tutel, FairScale, CUDA ...) was asked for and is not here."""


class DistributedError(SwinMoEError, RuntimeError):
    """Ranks disagree, or a collective could not finish."""


class CollectiveError(DistributedError):
    """A collective could not finish. As a rule another rank stopped earlier, and its message tells more."""


class Preempted(SwinMoEError):
    """The job was asked to stop, and has saved; it can go on from there. Exit status 75, "try again later"."""


class NonFiniteLossError(SwinMoEError, FloatingPointError):
    """Training met a NaN or an infinity; the last good checkpoint is kept."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest allowed names, or an empty string."""
    close = get_close_matches(given, list(allowed), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
