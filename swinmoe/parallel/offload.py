"""Activations that wait for the backward pass in the host's memory, by torch's `save_on_cpu`.

Not by FairScale's checkpoint wrapper, which offloads too: it is reentrant, and cuts a loss returned inside a dataclass
(an expert layer's) off from the graph without a word.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn


class _SavedOnHost(torch.autograd.graph.save_on_cpu):
    """`save_on_cpu` for all but parameters: those are on the device anyway, and a copy of each would come back beside
    the original."""

    def __init__(self, pin_memory: bool) -> None:
        super().__init__(pin_memory=pin_memory)
        pack, unpack = self.pack_hook, self.unpack_hook

        def pack_activation(tensor: Tensor) -> Any:
            # A matrix product saves its weight as a transposed view.
            whole = tensor if tensor._base is None else tensor._base
            return tensor if isinstance(whole, nn.Parameter) else pack(tensor)

        def unpack_activation(packed: Any) -> Tensor:
            found: Tensor = packed if isinstance(packed, Tensor) else unpack(packed)
            return found

        self.pack_hook, self.unpack_hook = pack_activation, unpack_activation


def saved_on_host(device: torch.device) -> AbstractContextManager[object]:
    """Within it, what a forward pass on `device` saves for its backward pass is copied to the host, pinned for a GPU.

    Values are the same to the bit. What is recomputed (`model.grad_checkpointing`) saves its inputs only, and those
    travel; what an autograd Function keeps without `save_for_backward` stays. On a CPU it is nothing: the host's copy
    of a host's tensor is that tensor. Never run on a GPU.
    """
    return _SavedOnHost(pin_memory=device.type == "cuda")
