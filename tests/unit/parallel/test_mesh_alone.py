"""A mesh of one process, and the errors that need no second one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from swinmoe.config import ParallelConfig
from swinmoe.errors import ConfigError
from swinmoe.parallel import (
    apply_expert_parallel,
    clip_grad_norm,
    expert_parameter_names,
    gather_full,
    global_sum,
    make_mesh,
    no_sync,
    sync_expert_gradients,
    take_local,
    unwrap,
    wrap_data_parallel,
)
from swinmoe.parallel.replicas import _buckets


def test_without_a_launcher_there_is_one_rank() -> None:
    mesh = make_mesh(ParallelConfig())
    assert (mesh.rank, mesh.world, mesh.ep_size, mesh.ep_rank, mesh.replica, mesh.replicas) == (0, 1, 1, 0, 0, 1)
    assert mesh.ep_group is mesh.replica_group is mesh.world_group is None
    assert mesh.is_main
    assert copy.deepcopy(mesh) is mesh


def test_ep_size_must_divide_the_processes() -> None:
    with pytest.raises(ConfigError, match=r"ep_size=2 does not divide the number of processes 1; use one of \[1\]"):
        make_mesh(ParallelConfig(ep_size=2), num_experts=8)


def test_ep_size_must_divide_the_experts() -> None:
    with pytest.raises(
        ConfigError, match=r"ep_size=3 does not divide the number of experts=8, .*; use one of \[1, 2, 4, 8\]"
    ):
        make_mesh(ParallelConfig(ep_size=3), num_experts=8)


def test_alone_everything_is_the_plain_thing() -> None:
    mesh = make_mesh(ParallelConfig())
    model = nn.Linear(3, 2)
    apply_expert_parallel(model, mesh)
    wrapped = wrap_data_parallel(model, mesh)
    assert wrapped is model and unwrap(wrapped) is model
    assert expert_parameter_names(model) == set()
    with no_sync(wrapped):
        wrapped(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad is not None
    before = model.weight.grad.clone()
    sync_expert_gradients(model, mesh)
    assert torch.equal(model.weight.grad, before)
    assert gather_full(model.weight, model.weight, mesh) is model.weight
    assert take_local(model.weight, model.weight, mesh) is model.weight
    assert torch.equal(global_sum(model.weight, mesh), model.weight)
    assert wrap_data_parallel(model, mesh, lambda m: nn.Sequential(m))[0] is model  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.25, 1e6, None])
def test_clipping_agrees_with_torch_on_one_process(dtype: torch.dtype, max_norm: float | None) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(5, 4, dtype=dtype) for _ in range(2))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine.grad = torch.randn_like(mine)
        other.grad = mine.grad.clone()
    norm = clip_grad_norm(ours, max_norm, make_mesh(ParallelConfig()))
    exact = torch.cat([p.grad.double().flatten() for p in theirs.parameters() if p.grad is not None]).norm()
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(norm.double(), exact, rtol=1e-14 if dtype == torch.float64 else 1e-6, atol=0)
    scale = 1.0 if max_norm is None else min(1.0, max_norm / (float(exact) + 1e-6))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert other.grad is not None
        torch.testing.assert_close(mine.grad, other.grad * scale)


def test_clipping_without_gradients_gives_zero() -> None:
    assert clip_grad_norm(nn.Linear(2, 2), 1.0, make_mesh(ParallelConfig())).item() == 0.0


def test_buckets_keep_order_and_dtype_and_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swinmoe.parallel.replicas.BUCKET_BYTES", 40)
    small, half, large = torch.zeros(4), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(100)
    runs = [len(bucket) for bucket in _buckets([small, small, small, half, half, large, small])]
    assert runs == [2, 1, 2, 1, 1]
    assert list(_buckets([])) == []
