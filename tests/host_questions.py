"""What a computation on the CPU would ask a device, if some of its tensors were there: each question is a wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from swinmoe.config import BalanceLossConfig, CapacityConfig, CapacityPolicy, MoEConfig, RouterConfig

FIXED = CapacityPolicy(kind="fixed", factor=1.25)
PADDED = MoEConfig(
    num_experts=4,
    top_k=2,
    dispatcher="padded",
    capacity=CapacityConfig(train=FIXED, eval=FIXED),
    router=RouterConfig(batch_prioritized=True),
    losses=BalanceLossConfig(gshard=0.01, importance=0.01, z=0.001),
    shared_expert_ratio=0.5,
)
RAGGED = replace(PADDED, dispatcher="ragged")

ASKING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten._unique2.default,
    torch.ops.aten.bincount.default,
}


class Questions(TorchDispatchMode):
    """Knows which tensors would be on the device, and lists what is asked of them."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.there: Any = WeakIdKeyDictionary()
        for tensor in tensors:
            self.there[tensor] = True

    def on_device(self, values: Any) -> bool:
        return any(isinstance(value, Tensor) and value in self.there for value in tree_iter(values))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = self.on_device((args, kwargs))
        if there and func in ASKING:
            self.asked.append(str(func))
        out = func(*args, **(kwargs or {}))
        if there:
            for value in tree_iter(out):
                if isinstance(value, Tensor):
                    self.there[value] = True
        return out


@contextmanager
def asked(monkeypatch: pytest.MonkeyPatch, *tensors: Tensor) -> Iterator[list[str]]:
    """What is asked of the device while the block runs; `tensors` begin there."""
    original: dict[str, Callable[..., Any]] = {name: getattr(Tensor, name) for name in ("cpu", "tolist")}
    mode = Questions(*tensors)

    def cpu(self: Tensor) -> Tensor:
        if self not in mode.there:
            return self
        mode.asked.append("cpu")
        return torch.tensor(original["tolist"](self), dtype=self.dtype)

    def tolist(self: Tensor) -> Any:
        if self in mode.there:
            mode.asked.append("tolist")
        return original["tolist"](self)

    monkeypatch.setattr(Tensor, "cpu", cpu)
    monkeypatch.setattr(Tensor, "tolist", tolist)
    with mode:
        yield mode.asked
