"""Expert gradients that go straight into `.grad` reach DDP's buckets like any other."""

from __future__ import annotations

import pytest
import torch
from pool import Pool
from torch.nn.parallel import DistributedDataParallel

from swinmoe.config import MoEConfig
from swinmoe.moe import MoEMlp

pytestmark = pytest.mark.distributed


def layer() -> MoEMlp:
    return MoEMlp(MoEConfig(num_experts=3, top_k=2), dim=4, hidden_dim=6, dtype=torch.float64, init_std=1.0)


def batch() -> torch.Tensor:
    return torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gradients_under_ddp(as_view: bool) -> list[dict[str, torch.Tensor]]:
    rank = torch.distributed.get_rank()
    model = DistributedDataParallel(layer(), gradient_as_bucket_view=as_view)
    steps = []
    for _ in range(3):
        model.zero_grad(set_to_none=False)  # from the second step on, `.grad` is there and is added to
        with model.no_sync():
            model(batch()[rank])[0].square().sum().backward()
        model(batch()[rank])[0].square().sum().backward()
        steps.append({name: p.grad.clone() for name, p in model.module.named_parameters()})
    return steps


@pytest.mark.parametrize("as_view", [False, True])
def test_every_step_has_the_mean_of_both_ranks(pool2: Pool, as_view: bool) -> None:
    single = layer()
    for part in batch():
        (single(part)[0].square().sum()).backward()  # twice per rank over two ranks: the mean is the sum of both
    for steps in pool2.run(gradients_under_ddp, as_view):
        for step in steps:
            for name, p in single.named_parameters():
                torch.testing.assert_close(step[name], p.grad, atol=1e-12, rtol=0)
