"""The dense MLP of a block. Shapes: (*, D) -> (*, D) through hidden width F."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinmoe.models.layers import exact_on_cpu, linear, project, unobserved
from swinmoe.native import biased_gelu


class Mlp(nn.Module):
    """fc1, GELU, dropout, fc2, dropout."""

    native: bool = False
    """Bias and GELU by our kernel in C++ where it can be used: float32 on a CPU."""

    def __init__(self, dim: int, hidden_dim: int, *, fc2_bias: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = linear(dim, hidden_dim)
        self.fc2 = linear(hidden_dim, dim, bias=fc2_bias)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """(*, D) -> (*, D)."""
        x = F.dropout(self._hidden(x), self.drop, self.training)
        return F.dropout(project(self.fc2, x), self.drop, self.training)

    def _hidden(self, x: Tensor) -> Tensor:
        if self.native and x.dtype == torch.float32 and exact_on_cpu(x) and unobserved(self.fc1):
            return biased_gelu(F.linear(x, self.fc1.weight), self.fc1.bias)
        return F.gelu(project(self.fc1, x))
