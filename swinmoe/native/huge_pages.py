"""Huge pages, 2 MB instead of 4 KB on most machines, under memory that a kernel jumps about in.

A panel of weights lies in hundreds of rows, each in a page of its own, and so does what is written to weight gradients.
A processor remembers the places of some 2,000 pages; for the others it walks tables of the system (and, in a virtual
machine, for each step of that walk those of its host), and a product waits. Of many experts' weights 2,000 small pages
are a corner, of huge ones they are all.

Linux gives huge pages to memory that asks for them, in its usual setting. `SWINMOE_HUGE_PAGES=0` asks for none.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

SWITCH = "SWINMOE_HUGE_PAGES"
_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_HUGEPAGE, _COLLAPSE = 14, 25  # madvise(2), MADV_*

_asked: Any = WeakIdKeyDictionary()
"""By tensor, where its numbers lay when it asked."""


def use_huge_pages(t: Tensor) -> bool:
    """Ask for huge pages under the numbers of `t`; whether there is anything to ask, and somebody.

    What is written later comes in huge pages at once; what is there already moves, some 0.3 ms a MB, on Linux 6.1 or
    later, and elsewhere in the system's own time. Numbers stay as they are, and so does the amount of memory. Asks once
    for each tensor and place. Pages that `t` shares with others are left alone.

    Args:
        t: contiguous, on a CPU, with memory of its own.
    """
    if not t.numel():
        return False
    begin = t.data_ptr()
    if _asked.get(t) == begin:
        return True
    size = _size()
    if not size:
        return False
    first, last = -(-begin // size), (begin + t.numel() * t.element_size()) // size  # whole pages alone
    if first >= last:
        return False
    _asked[t] = begin
    where = (ctypes.c_void_p(first * size), ctypes.c_size_t((last - first) * size))
    if _madvise()(*where, _HUGEPAGE):  # memory of a file, for one
        return False
    _madvise()(*where, _COLLAPSE)  # an older system refuses, as one with no huge page to spare does: it may do it later
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
    return ctypes.CDLL(None).madvise
