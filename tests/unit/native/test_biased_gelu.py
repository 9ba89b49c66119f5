"""The kernel or torch in float64: the same GELU, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from swinmoe.native import biased_gelu

pytestmark = [
    pytest.mark.usefixtures("native_kernels"),
    # Dynamo looks at `.grad` of every input, also of one that is no leaf.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (3, 4, 37), (2, 3, 5, 96), (0, 7)])
def test_equals_torch_in_double_precision(shape: tuple[int, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x, bias, slope = torch.randn(shape) * 2, torch.randn(shape[-1]), torch.randn(shape)
    x.requires_grad_(), bias.requires_grad_()
    y = biased_gelu(x, bias)
    exact = F.gelu(x.double() + bias.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
    mine, other = (torch.autograd.grad(v, [x, bias], slope.to(v.dtype)) for v in (y, exact))
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_every_digit_far_left() -> None:
    """Where the value is tiny, its relative error is that of the rounded square in the exponent."""
    x = torch.linspace(-12, 0, 10_001, dtype=torch.float64)[:-1].float()
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    relative = ((biased_gelu(x, torch.zeros_like(x)).double() - exact) / exact).abs()
    assert relative.max() < 1e-5
    assert relative[x > -3].max() < 1e-6


def test_ends_of_the_line() -> None:
    x = torch.tensor([[float("inf"), 200.0, -200.0, 0.0, float("nan")]])
    y = biased_gelu(x, torch.zeros(5))[0]
    assert y[0] == float("inf") and y[1] == 200 and y[2] == 0 and y[3] == 0 and y[4].isnan()


def test_is_an_operator_as_torch_wants_them() -> None:
    x, bias = torch.randn(3, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    torch.library.opcheck(torch.ops.swinmoe.biased_gelu.default, (x, bias))
    given = (torch.randn(3, 5), x.detach(), bias.detach())
    torch.library.opcheck(torch.ops.swinmoe.biased_gelu_backward.default, given)


def test_strides_do_not_matter() -> None:
    x, bias = torch.randn(6, 5), torch.randn(6)
    torch.testing.assert_close(biased_gelu(x.t(), bias), biased_gelu(x.t().contiguous(), bias), rtol=0, atol=0)


def test_second_derivatives_are_refused() -> None:
    x, bias = torch.randn(3, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad(biased_gelu(x, bias).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="native=False"):
        grad.sum().backward()


def test_sums_over_many_rows_keep_their_digits() -> None:
    x, bias, slope = torch.randn(300_000, 3), torch.zeros(3, requires_grad=True), torch.rand(300_000, 3)
    x.requires_grad_()
    grad_x, grad_bias = torch.autograd.grad(biased_gelu(x, bias), [x, bias], slope)
    torch.testing.assert_close(grad_bias.double(), grad_x.double().sum(0), rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.randn(3, 5, dtype=torch.float64), torch.randn(5), "x is torch.float64"),
        (torch.randn(3, 5), torch.randn(5).bfloat16(), "bias is torch.bfloat16"),
        (torch.randn(3, 5), torch.randn(1), r"bias of shape \(1,\) does not fit rows of 5"),
    ],
)
def test_what_does_not_fit_is_refused(x: torch.Tensor, bias: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        biased_gelu(x, bias)


def test_forward_mode_derivatives_are_refused() -> None:
    x = torch.randn(3, 5)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        biased_gelu(forward_ad.make_dual(x, torch.ones_like(x)), torch.randn(5))
