"""A sparsified foreign model whose experts are spread over ranks: outputs, losses and gradients of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pool import Pool
from torch import Tensor, nn

from swinmoe.checkpoint.sparsify import collect_routing, sparsify
from swinmoe.checkpoint.upcycle import Upcycling
from swinmoe.config import BalanceLossConfig, MoEConfig, ParallelConfig
from swinmoe.parallel import (
    apply_expert_parallel,
    gather_full,
    make_mesh,
    sync_expert_gradients,
    wrap_data_parallel,
)

pytestmark = pytest.mark.distributed


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def build() -> nn.Module:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 8), Block(), nn.Linear(8, 8), Block(), nn.Linear(8, 3)).double()
    cfg = MoEConfig(num_experts=4, top_k=2, losses=BalanceLossConfig(gshard=0.1))
    sparsify(model, ["1", "3"], cfg, Upcycling(noise=0.5))
    return model


def data() -> Tensor:
    return torch.randn(9, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def backward(model: nn.Module, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    with collect_routing(model) as routing:
        y = model(x)
    (y.square().sum() / count + routing.loss).backward()
    return y.detach(), routing.loss.detach()


def spread(ep_size: int) -> dict[str, Any]:
    alone, model, x = build(), build(), data()
    mesh = make_mesh(ParallelConfig(ep_size=ep_size), None)
    apply_expert_parallel(model, mesh)
    wrapped = wrap_data_parallel(model, mesh, None)
    y, loss = backward(alone, x, len(x))
    mine = slice(0, 4) if mesh.rank == 0 else slice(4, 9)
    own, own_loss = backward(wrapped, x[mine], len(x))
    sync_expert_gradients(model, mesh)
    torch.testing.assert_close(own, y[mine])
    torch.testing.assert_close(own_loss, loss)
    far = {}
    theirs = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        whole, expected = gather_full(parameter.grad, parameter, mesh), theirs[name].grad
        far[name] = float((whole - expected).abs().max() / expected.abs().max())
    return far


@pytest.mark.parametrize("ep_size", [1, 2])
def test_experts_of_a_foreign_model_spread_over_ranks(pool2: Pool, ep_size: int) -> None:
    for far in pool2.run(spread, ep_size):
        assert len(far) == 6 + 2 * 5
        assert max(far.values()) < 1e-12, far
