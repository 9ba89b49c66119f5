"""How often the host waits for the device: never in the padded layout, once in the ragged one.

Shown without a GPU in two ways. The padded layout runs on fake tensors, which say they are on one, and on meta tensors,
backward too; neither have values: anything that asks for a value, or has a size that depends on one, raises. The ragged
layout does ask, so it runs on real tensors of which those that would be on the device are known, and every question is
counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from swinmoe.config import BalanceLossConfig, CapacityConfig, CapacityPolicy, MoEConfig, RouterConfig
from swinmoe.moe import MoEMlp, expert_mlp

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


def step(layer: MoEMlp, x: Tensor) -> None:
    y, stats = layer(x)
    (y.square().sum() + stats.loss).backward()


def fake_layer(cfg: MoEConfig) -> MoEMlp:
    """On a GPU that is not there; weights have no values."""
    layer = MoEMlp(cfg, dim=16, hidden_dim=32, device="meta")
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape, device="cuda")))
    return layer


@pytest.mark.parametrize("dispatcher", ["padded", "gshard"])
def test_static_layouts_ask_nothing(dispatcher: str) -> None:
    with FakeTensorMode():
        layer = fake_layer(replace(PADDED, dispatcher=dispatcher))
        x = torch.empty(3, 8, 16, device="cuda", requires_grad=True)
        assert layer(x)[0].device.type == "cuda"
        assert layer.eval()(x)[0].device.type == "cuda"


@pytest.mark.parametrize("dispatcher", ["padded", "gshard"])
def test_nor_does_their_backward_pass(dispatcher: str) -> None:
    """On the meta device, since autograd wants a driver for a GPU."""
    layer = MoEMlp(replace(PADDED, dispatcher=dispatcher), dim=16, hidden_dim=32, device="meta")
    x = torch.empty(3, 8, 16, device="meta", requires_grad=True)
    step(layer, x)
    assert x.grad is not None and all(p.grad is not None for p in layer.parameters())


def test_the_ragged_layout_asks() -> None:
    """That fake tensors do raise."""
    with FakeTensorMode():
        layer = fake_layer(RAGGED)
        with pytest.raises((DataDependentOutputException, RuntimeError)):
            layer(torch.empty(24, 16, device="cuda"))


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


@pytest.mark.parametrize("policy", [CapacityPolicy(), FIXED, CapacityPolicy(kind="fixed", factor=0.5)])
@pytest.mark.parametrize("path", [expert_mlp.plain_mlp, expert_mlp.grouped_mlp])
def test_the_ragged_layout_asks_once_in_a_step(
    monkeypatch: pytest.MonkeyPatch, path: Any, policy: CapacityPolicy
) -> None:
    """On the ways that GPUs take through the experts."""
    monkeypatch.setattr(expert_mlp, "blocked_mlp", path)
    layer = MoEMlp(replace(RAGGED, capacity=CapacityConfig(train=policy)), dim=16, hidden_dim=32)
    x = torch.randn(24, 16, requires_grad=True)
    with asked(monkeypatch, x, *layer.parameters()) as questions:
        step(layer, x)
    assert questions == ["cpu"]


def test_questions_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    with asked(monkeypatch, x) as questions:
        (x * 2).sum().item()
        (x + 1).nonzero()
        (x + 1).tolist()
        torch.ones(3).sum().item()  # of the host's own
    assert questions == ["aten._local_scalar_dense.default", "aten.nonzero.default", "tolist"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's own watch over synchronisation")
@pytest.mark.parametrize(("dispatcher", "waits"), [("padded", 0), ("gshard", 0), ("ragged", 1)])
def test_on_a_gpu_torch_sees_as_many(dispatcher: str, waits: int) -> None:
    layer = MoEMlp(replace(PADDED, dispatcher=dispatcher), dim=16, hidden_dim=32, device="cuda")
    x = torch.randn(3, 8, 16, device="cuda", requires_grad=True)
    step(layer, x)  # libraries' handles are made, which waits
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(layer, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in seen) == waits
