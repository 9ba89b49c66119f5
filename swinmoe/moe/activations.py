"""Expert activations with their derivatives, for code that writes its own backward pass.

Shapes: n rows, F hidden width of an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation:
    """(n, rows_per_hidden·F) -> (n, F), each row and hidden unit by itself. One of your own overrides `value`."""

    rows_per_hidden: int = 1
    """Rows of fc1 for each hidden unit: 1, or 2 with a gate."""

    def value(self, pre: Tensor) -> Tensor:
        """Made of ordinary differentiable operations; leaves `pre` as it is."""
        raise NotImplementedError

    def gradient(self, grad: Tensor, pre: Tensor) -> Tensor:
        """Gradient of `pre` from the gradient of the value; override it where a faster form is known.

        `grad` is the caller's to lose: the result may stand in its memory.
        """
        with torch.enable_grad():
            leaf = pre.detach().requires_grad_()
            return torch.autograd.grad(self.value(leaf), leaf, grad)[0]


class Gelu(Activation):
    """x·Φ(x), exact (Hendrycks & Gimpel 2016), as in Swin's MLPs."""

    def value(self, pre: Tensor) -> Tensor:
        """(n, F) -> (n, F)."""
        return F.gelu(pre)

    def gradient(self, grad: Tensor, pre: Tensor) -> Tensor:
        """(n, F) -> (n, F)."""
        out: Tensor = torch.ops.aten.gelu_backward.grad_input(grad, pre, grad_input=grad)
        return out


class Relu(Activation):
    """max(x, 0), as in GShard's and Tutel's experts."""

    def value(self, pre: Tensor) -> Tensor:
        """(n, F) -> (n, F)."""
        return F.relu(pre)

    def gradient(self, grad: Tensor, pre: Tensor) -> Tensor:
        """(n, F) -> (n, F)."""
        return grad.mul_(pre > 0)


class SwiGlu(Activation):
    """value·SiLU(gate) (Shazeer 2020). Columns 2i and 2i + 1 of `pre` are value and gate of hidden unit i."""

    rows_per_hidden = 2

    def value(self, pre: Tensor) -> Tensor:
        """(n, 2F) -> (n, F)."""
        value, gate = _value_and_gate(pre)
        return value * F.silu(gate)

    def gradient(self, grad: Tensor, pre: Tensor) -> Tensor:
        """(n, F) -> (n, 2F)."""
        value, gate = _value_and_gate(pre)
        return torch.stack((grad * F.silu(gate), torch.ops.aten.silu_backward(grad * value, gate)), dim=-1).flatten(-2)


def _value_and_gate(pre: Tensor) -> tuple[Tensor, Tensor]:
    # No size is left to infer, since a block may be empty.
    value, gate = pre.view(*pre.shape[:-1], pre.shape[-1] // 2, 2).unbind(-1)
    return value, gate
