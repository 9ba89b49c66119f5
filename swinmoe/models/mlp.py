"""The dense MLP of a block. Shapes: (*, D) -> (*, D) through hidden width F."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from swinmoe.models.layers import linear, project


class Mlp(nn.Module):
    """fc1, GELU, dropout, fc2, dropout."""

    def __init__(self, dim: int, hidden_dim: int, *, fc2_bias: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = linear(dim, hidden_dim)
        self.fc2 = linear(hidden_dim, dim, bias=fc2_bias)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """(*, D) -> (*, D)."""
        x = F.dropout(F.gelu(project(self.fc1, x)), self.drop, self.training)
        return F.dropout(project(self.fc2, x), self.drop, self.training)
