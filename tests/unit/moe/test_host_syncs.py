"""How often the host waits for the device: never in the padded layout, once in the ragged one.

Shown without a GPU in two ways. The padded layout runs on fake tensors, which say they are on one, and on meta tensors,
backward too; neither have values: anything that asks for a value, or has a size that depends on one, raises. The ragged
layout does ask, so it runs on real tensors of which those that would be on the device are known, and every question is
counted.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from host_questions import FIXED, PADDED, RAGGED, asked
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from swinmoe.config import CapacityConfig, CapacityPolicy, MoEConfig
from swinmoe.moe import MoEMlp, expert_mlp


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
