"""Memory for weight gradients that stays from step to step where gradients themselves do not.

`optimizer.zero_grad()` lets gradients go (torch's default), and the next backward pass makes new ones. On a CPU the
allocator has meanwhile given tensors of that size back to the system, and touching each new page for the first time
takes longer than the product that is written there. Gradients that are kept instead and set to zero cost a pass over
all of them, and each product then has to read what it adds to. So this module keeps the memory, one buffer for each
parameter, and lends it to one gradient at a time: nobody zeroes it, and what writes it need not read it.

A gradient that somebody still holds when the next one is due stays theirs: the next comes in memory of its own.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from swinmoe.native import use_huge_pages


class _Buffer:
    """The memory for one parameter's gradient, and who has it.

    A tensor made of a NumPy array keeps that array alive for as long as its storage lives, however many tensors share
    the storage. So a weak reference to the array tells when the last of them has gone.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self._lent: weakref.ref[Any] | None = None

    def fits(self, weight: Tensor) -> bool:
        return self.memory.shape == weight.shape and self.memory.dtype == weight.dtype

    def lend(self) -> Tensor | None:
        """All of it, under a storage of its own; None while an earlier one lives."""
        if self._lent is not None and self._lent() is not None:
            return None
        array = self.memory.view(torch.uint8).numpy()  # as bytes: NumPy has no bfloat16
        self._lent = weakref.ref(array)
        return torch.from_numpy(array).view(self.memory.dtype)


_buffers: Any = WeakIdKeyDictionary()
"""By parameter; a buffer goes when its parameter does."""
_one_at_a_time = threading.Lock()


def kept(parameter: Tensor) -> Tensor | None:
    """The memory that stays for the gradients of `parameter`, lent or not; None if there is none."""
    buffer = _buffers.get(parameter)
    return None if buffer is None else buffer.memory


def take(weight: Tensor, parameter: Tensor | None) -> Tensor:
    """Memory for the gradient of `weight`, contiguous, of its shape and dtype and with arbitrary values.

    Args:
        weight: (e, ...).
        parameter: whose `.grad` it is to become. None where it becomes nobody's: that memory is not kept.
    """
    new = torch.contiguous_format
    if parameter is None or weight.device.type != "cpu":  # torch keeps the memory of other devices itself
        return torch.empty_like(weight, memory_format=new)
    with _one_at_a_time:
        buffer = _buffers.get(parameter)
        if buffer is None or not buffer.fits(weight):
            memory = torch.empty_like(weight, memory_format=new)
            if type(memory) is not Tensor:  # a fake one, that has no memory, or another kind altogether
                return memory
            buffer = _buffers[parameter] = _Buffer(memory)
        use_huge_pages(buffer.memory, move=True)
        lent: Tensor | None = buffer.lend()
    return torch.empty_like(weight, memory_format=new) if lent is None else lent
