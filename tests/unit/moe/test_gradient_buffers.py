"""Memory of weight gradients: lent again once nobody has it, and never while somebody does."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from swinmoe.config import MoEConfig
from swinmoe.moe import MoEMlp, gradient_buffers


def make(dtype: torch.dtype = torch.float32) -> MoEMlp:
    return MoEMlp(MoEConfig(num_experts=4), dim=8, hidden_dim=16, dtype=dtype)


def tokens(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(24, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def backward(layer: MoEMlp, x: Tensor) -> None:
    y, _ = layer(x)
    y.square().sum().backward()


def gradients(layer: nn.Module) -> list[Tensor]:
    found = [p.grad for p in layer.parameters()]
    assert all(g is not None for g in found)
    return [g for g in found if g is not None]


def fresh(layer: MoEMlp, x: Tensor) -> list[Tensor]:
    """Gradients of a layer that has never had any: the oracle."""
    other = copy.deepcopy(layer)
    other.zero_grad()
    backward(other, x)
    return gradients(other)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_next_gradient_lies_where_the_last_one_did(dtype):
    layer = make(dtype)
    places = set()
    for seed in range(4):
        layer.zero_grad()
        backward(layer, tokens(seed, dtype))
        assert_equal(gradients(layer), fresh(layer, tokens(seed, dtype)))
        weight = layer.experts.fc1_weight
        assert weight.grad is not None and weight.grad.dtype == dtype and weight.grad.is_contiguous()
        places.add(weight.grad.data_ptr())
    assert len(places) == 1


@pytest.mark.parametrize(
    "share", [lambda g: g, lambda g: g.detach(), lambda g: g[1:, :2], lambda g: g.untyped_storage()]
)
def test_a_gradient_that_somebody_holds_is_left_alone(share):
    layer = make()
    backward(layer, tokens(0))
    before = gradients(layer)[1].clone()
    assert layer.experts.fc1_weight.grad is not None
    held = share(layer.experts.fc1_weight.grad)
    seen = torch.tensor(held, dtype=torch.uint8) if isinstance(held, torch.UntypedStorage) else held.clone()
    for seed in (1, 2):  # twice: memory that was lent out is not forgotten either
        layer.zero_grad()
        backward(layer, tokens(seed))
        assert_equal(gradients(layer), fresh(layer, tokens(seed)))
    now = torch.tensor(held, dtype=torch.uint8) if isinstance(held, torch.UntypedStorage) else held
    assert torch.equal(now, seen) and not torch.equal(before, gradients(layer)[1])


def test_memory_comes_back_when_the_holder_lets_go():
    layer = make()
    backward(layer, tokens(0))
    held = layer.experts.fc1_weight.grad
    assert held is not None
    place = held.data_ptr()
    for seed in (1, 2):
        layer.zero_grad()
        backward(layer, tokens(seed))
        assert layer.experts.fc1_weight.grad is not None
        assert (layer.experts.fc1_weight.grad.data_ptr() == place) is (seed == 2)
        held = None


def test_experts_without_rows_have_zeros_not_what_was_there():
    layer = make()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0, 0] = layer.router.weight[1, 1] = 1.0
    everywhere = torch.zeros(24, 8)
    everywhere[:12, 0] = everywhere[12:, 1] = 1.0
    backward(layer, everywhere)
    layer.zero_grad()
    only_first = torch.zeros(24, 8)
    only_first[:, 0] = 1.0
    backward(layer, only_first)
    for parameter in (layer.experts.fc1_weight, layer.experts.fc2_weight):
        assert parameter.grad is not None
        assert parameter.grad[0].any() and not parameter.grad[1:].any()


def test_one_parameter_twice_in_a_graph():
    layer = make()
    for seed in range(2):  # the second time with a buffer to lend
        layer.zero_grad()
        first, second = tokens(seed), tokens(seed + 10)
        (layer(first)[0].square().sum() + layer(second)[0].square().sum()).backward()
        for found, one, other in zip(gradients(layer), fresh(layer, first), fresh(layer, second), strict=True):
            torch.testing.assert_close(found, one + other)


def test_gradients_asked_for_are_the_askers():
    layer = make()
    weights = [layer.experts.fc1_weight, layer.experts.fc2_weight]
    first = torch.autograd.grad(layer(tokens(0))[0].square().sum(), weights)
    kept = [g.clone() for g in first]
    torch.autograd.grad(layer(tokens(1))[0].square().sum(), weights)
    backward(layer, tokens(2))
    assert_equal(list(first), kept)


def test_a_buffer_goes_with_its_parameter():
    layer = make()
    backward(layer, tokens(0))
    buffer = weakref.ref(gradient_buffers._buffers[layer.experts.fc1_weight])
    layer.zero_grad()
    assert buffer() is not None
    del layer
    gc.collect()
    assert buffer() is None


def test_a_parameter_that_changes_its_dtype_gets_another_buffer():
    layer = make()
    backward(layer, tokens(0))
    layer.zero_grad()
    layer.double()
    backward(layer, tokens(1, torch.float64))
    assert_equal(gradients(layer), fresh(layer, tokens(1, torch.float64)))


def test_nothing_is_kept_of_fake_tensors():
    known = len(gradient_buffers._buffers)
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(4, 8, 16))
        assert isinstance(gradient_buffers.take(weight, weight), FakeTensor)
    assert len(gradient_buffers._buffers) == known
