"""The `gshard` and `tutel` dispatchers with experts spread over ranks: their rows take our exchange, as all rows do."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch.distributed as dist
from pool import Pool
from test_expert_layer import check, compare_with_oracle, config, make_layer, task_loss, tokens_of_all
from torch import Tensor

from swinmoe.config import CapacityConfig, CapacityPolicy, MoEConfig, ParallelConfig
from swinmoe.moe import MoEMlp
from swinmoe.parallel import apply_expert_parallel, make_mesh, sync_expert_gradients

pytestmark = pytest.mark.distributed
SUB_GROUPS = ParallelConfig(ep_size=2)  # of four ranks
CUT = CapacityConfig(train=CapacityPolicy(kind="fixed", factor=0.75))


@pytest.mark.parametrize("counts", [[7, 0, 12, 5], [4, 4, 4, 4]])
@pytest.mark.parametrize("ep_size", [2, 4])
def test_gshard_equals_one_process(pool4: Pool, counts: list[int], ep_size: int) -> None:
    cfg = config(dispatcher="gshard", top_k=2)
    check(pool4.run(compare_with_oracle, cfg, counts, ParallelConfig(ep_size=ep_size)))


def results_of(layer: MoEMlp, x: Tensor, parallel: ParallelConfig) -> list[Tensor]:
    """Output, token gradient and weight gradients of this rank, in float32."""
    mesh = make_mesh(parallel, layer.num_experts)
    apply_expert_parallel(layer, mesh)
    x = x.clone().requires_grad_()
    y, stats = layer(x)
    (task_loss(x, y) + stats.loss).backward()
    sync_expert_gradients(layer, mesh)
    gradients = [p.grad for p in layer.parameters()]
    assert all(g is not None for g in (x.grad, *gradients))
    return [y.detach(), x.grad, *gradients]  # type: ignore[list-item]


def tutel_beside_padded(cfg: MoEConfig, counts: list[int], everywhere: bool) -> float:
    """Largest difference between the two, over the largest value; on odd ranks both may be `padded`."""
    rank = dist.get_rank()
    x = tokens_of_all(counts)[rank].float()
    ours = make_layer(replace(cfg, dispatcher="padded")).float()
    theirs = copy.deepcopy(ours)
    if everywhere or rank % 2 == 0:
        theirs = make_layer(replace(cfg, dispatcher="tutel")).float()
    pairs = zip(results_of(ours, x, SUB_GROUPS), results_of(theirs, x, SUB_GROUPS), strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1)) for a, b in pairs if a.numel())


@pytest.mark.skipif(find_spec("tutel") is None, reason="Tutel is not installed")
@pytest.mark.parametrize("everywhere", [True, False], ids=["all ranks", "even ranks alone"])
@pytest.mark.parametrize("counts", [[7, 0, 12, 5], [8, 8, 8, 8]])
@pytest.mark.parametrize("capacity", [CUT, CapacityConfig()], ids=["fixed", "dropless"])
def test_tutels_kernels_with_our_exchange(
    pool4: Pool, capacity: CapacityConfig, counts: list[int], everywhere: bool
) -> None:
    cfg = config(top_k=2, capacity=capacity)
    assert max(pool4.run(tutel_beside_padded, cfg, counts, everywhere)) < 1e-5
