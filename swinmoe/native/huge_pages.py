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
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

SWITCH = "SWINMOE_HUGE_PAGES"
_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_HUGEPAGE, _COLLAPSE = 14, 25  # madvise(2), MADV_*
_SECONDS = 60.0
"""Between two moves of one tensor."""

_moved: Any = WeakIdKeyDictionary()
"""By tensor, where it lay when it last asked, and when it last moved."""
_none_left = False
"""Whether the system has looked for huge pages to move memory to, and found none: it looks long."""


def use_huge_pages(t: Tensor, *, move: bool) -> bool:
    """Ask for huge pages under the numbers of `t`; whether it did.

    What is written later comes in huge pages at once. What is there already may move, on Linux 6.1 or later, some
    0.3 ms a MB on an idle machine; elsewhere it waits for the system's own time. Numbers stay as they are, and what
    lies around them in the same pages is left alone. Memory that a fork has split into small pages moves again, and
    memory made anew for each step does not with each step: a tensor moves at most once a minute.

    Args:
        t: contiguous, on a CPU.
        move: whether to move what is there. Not worth it for what is about to be written, and not right where nobody
            writes: processes that share memory since a fork get copies of their own.
    """
    size = _size()
    if not size or not t.numel() or t.is_shared():
        return False
    begin, now, moved = t.data_ptr(), 0.0, None
    if move:
        now = time.monotonic()
        asked, moved = _moved.get(t, (0, None))
        if moved is not None and now - moved >= _SECONDS:
            moved = None
        elif moved is not None and asked == begin:
            return True
    first, last = -(-begin // size), (begin + t.numel() * t.element_size()) // size  # whole pages alone
    if first >= last:
        return False
    where = ctypes.c_void_p(first * size), ctypes.c_size_t((last - first) * size)
    if _madvise()(*where, _HUGEPAGE):  # a system without, whatever its settings say
        return False
    if move:
        if moved is None:
            _move(where)
        _moved[t] = begin, now if moved is None else moved
    return True


def _move(where: tuple[ctypes.c_void_p, ctypes.c_size_t]) -> None:
    """Refusals cost nothing but speed: of an older system (EINVAL), of a page that is in use for a moment (EAGAIN)."""
    global _none_left
    if not _none_left and _madvise()(*where, _COLLAPSE):
        _none_left = ctypes.get_errno() in (errno.ENOMEM, errno.EBUSY)  # of the machine, or of this process's share


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
