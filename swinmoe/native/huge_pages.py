"""Huge pages, 2 MB instead of 4 KB on most machines, under memory that a kernel jumps about in.

A panel of weights lies in hundreds of rows, each in a page of its own, and so does what is written to weight gradients
and read of pre-activations. A processor remembers the places of some 2,000 pages; for the others it walks tables of the
system (and, in a virtual machine, for each step of that walk those of its host), and a product waits. Of many experts'
weights 2,000 small pages are a corner, of huge ones they are all.

Linux gives huge pages to memory that asks for them, in its usual setting. `SWINMOE_HUGE_PAGES=0` asks for none.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from pathlib import Path
from typing import Any

from torch import Tensor

SWITCH = "SWINMOE_HUGE_PAGES"
_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_HUGEPAGE, _COLLAPSE = 14, 25  # madvise(2), MADV_*

_none_left = False
"""Whether the system has looked for huge pages to move memory to, and found none: it looks long."""


def use_huge_pages(t: Tensor) -> bool:
    """Ask for huge pages under the numbers of `t`; whether there is anything to ask, and somebody.

    What is written later comes in huge pages at once; what is there already moves, some 0.3 ms a MB, on Linux 6.1 or
    later, and elsewhere in the system's own time. Numbers stay as they are, and so does the amount of memory. Pages
    that `t` shares with others are left alone. Where all is as it should be, a call takes some 5 microseconds.

    Args:
        t: contiguous, on a CPU, with memory of its own.
    """
    global _none_left
    size = _size()
    if not size or not t.numel():
        return False
    begin = t.data_ptr()
    first, last = -(-begin // size), (begin + t.numel() * t.element_size()) // size  # whole pages alone
    if first >= last:
        return False
    where = ctypes.c_void_p(first * size), ctypes.c_size_t((last - first) * size)
    if _madvise()(*where, _HUGEPAGE):  # memory of a file, for one
        return False
    if not _none_left and _madvise()(*where, _COLLAPSE):
        _none_left = ctypes.get_errno() != errno.EINVAL  # which is an older system, or memory that it does not do
    return True


@functools.cache
def _size() -> int:
    """Bytes of a huge page; 0 where there are none, or nobody is to have any."""
    if os.environ.get(SWITCH) == "0":
        return 0
    try:
        never = "[never]" in (_SETTINGS / "enabled").read_text("utf-8")
        return 0 if never else int((_SETTINGS / "hpage_pmd_size").read_text("utf-8"))
    except (OSError, ValueError):  # another system, or Linux without them
        return 0


@functools.cache
def _madvise() -> Any:
    return ctypes.CDLL(None, use_errno=True).madvise
