"""Activations saved on the host: the same gradients to the bit, parameters left alone, nothing left on the device."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swinmoe.models import SwinTransformer, create_model
from swinmoe.parallel import saved_on_host

CPU = torch.device("cpu")
IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Elsewhere:
    """Stands in for a device: what is packed comes back as another tensor, and is lost where it was."""

    def __init__(self) -> None:
        self.hooks: Any = saved_on_host(CPU)
        self.kept: list[Tensor] = []
        self.packed = 0
        pack, unpack = self.hooks.pack_hook, self.hooks.unpack_hook

        def carry(tensor: Tensor) -> Any:
            there = pack(tensor)
            if isinstance(there, Tensor):
                self.kept.append(there)
                return there
            self.packed += tensor.nbytes
            device, copy = there
            return device, copy.clone()

        self.hooks.pack_hook, self.hooks.unpack_hook = carry, unpack


def gradients(model: SwinTransformer, around: Any) -> list[Tensor]:
    torch.manual_seed(1)
    for layer in model.moe_layers().values():
        layer.seed_noise(2)
    model.zero_grad()
    with around:
        output = model(IMAGES)
    (output.logits.square().sum() + output.aux_loss).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("recompute", [False, True, [0]], ids=str)
def test_gradients_are_the_same_to_the_bit(recompute: Any) -> None:
    model = create_model("swin_moe_micro", num_classes=7, drop_path_rate=0.3, attn_drop_rate=0.2).double().train()
    model.prepare_tables()
    model.set_grad_checkpointing(recompute)
    expected = gradients(model, nullcontext())
    elsewhere = Elsewhere()
    found = gradients(model, elsewhere.hooks)
    assert len(found) == len(expected) > 40
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert elsewhere.packed > 0
    own = {p.data_ptr() for p in model.parameters()}
    assert elsewhere.kept and all(t.data_ptr() in own for t in elsewhere.kept)


def test_an_activation_goes_and_a_weight_stays() -> None:
    elsewhere = Elsewhere()
    weight = nn.Parameter(torch.ones(3, 2))
    x = torch.ones(5, 2, requires_grad=True)  # a leaf, and no weight
    with elsewhere.hooks:
        y = torch.nn.functional.linear(x, weight)
    assert [t.data_ptr() for t in elsewhere.kept] == [weight.data_ptr()] and elsewhere.packed == x.nbytes
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((5, 2), 3.0))


def test_memory_is_pinned_for_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(
        "torch.autograd.graph.save_on_cpu.__init__", lambda self, pin_memory, **_: asked.append(pin_memory)
    )
    monkeypatch.setattr("torch.autograd.graph.save_on_cpu.pack_hook", None, raising=False)
    monkeypatch.setattr("torch.autograd.graph.save_on_cpu.unpack_hook", None, raising=False)
    saved_on_host(CPU)
    saved_on_host(torch.device("cuda", 1))
    assert asked == [False, True]
