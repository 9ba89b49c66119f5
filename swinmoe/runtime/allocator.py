"""Memory that a CPU run frees stays with its process."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT = 256 * 2**20
"""Bytes. What is larger goes back to the system as soon as it is freed, as ever."""


def keep_freed_memory() -> bool:
    """Tell the C library to keep what is freed; whether it did.

    A training step frees all its activations and asks for as much again. glibc gives large pieces back to the system in
    between, and touching every page for the first time again costs 3 to 10 % of a small model's step. The process's
    memory is then that of its highest point until it ends. Does nothing where the library is another one, or where
    environment variables (`MALLOC_*_`, `GLIBC_TUNABLES`) say how to allocate.
    """
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") and name.endswith("_") for name in os.environ
    ):
        return False
    try:
        if not os.confstr("CS_GNU_LIBC_VERSION"):
            return False
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, ValueError):
        return False
    # Both: with one of them set, the library no longer finds the other for itself.
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST_KEPT)) and bool(mallopt(_TRIM_THRESHOLD, -1))
