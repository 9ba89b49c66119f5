"""A whole training step on a mesh: which messages are sent, how many, and when replicas are summed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from pool import Pool
from torch import Tensor, nn

from swinmoe.comm import listen
from swinmoe.config import BalanceLossConfig, MoEConfig, ParallelConfig
from swinmoe.errors import DistributedError
from swinmoe.moe import MoEMlp
from swinmoe.parallel import (
    apply_expert_parallel,
    clip_grad_norm,
    make_mesh,
    no_sync,
    replicas,
    sync_expert_gradients,
    unwrap,
    wrap_data_parallel,
)

pytestmark = pytest.mark.distributed

DIM, LAYERS = 8, 3


class Stack(nn.Module):
    """Expert layers with a dense one before each, so that every expert layer's rows need a gradient."""

    def __init__(self) -> None:
        super().__init__()
        cfg = MoEConfig(num_experts=4, losses=BalanceLossConfig(gshard=0.1))
        self.dense = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(LAYERS))
        self.sparse = nn.ModuleList(MoEMlp(cfg, dim=DIM, hidden_dim=2 * DIM, name=f"{i}") for i in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for dense, sparse in zip(self.dense, self.sparse, strict=True):
            x, stats = sparse(dense(x))
            total = total + stats.loss
        return x.square().sum() + total


def spread(**parallel: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Stack()
    mesh = make_mesh(ParallelConfig(**parallel), 4)
    apply_expert_parallel(model, mesh)
    return wrap_data_parallel(model, mesh), mesh


def messages(parallel: dict[str, Any], micro_batches: int) -> Counter[tuple[str, str]]:
    """(operation, what) of everything one step sends; layers' own names cut off."""
    model, mesh = spread(**parallel)
    model(torch.randn(5, DIM)).backward()  # DDP forms its buckets anew after the first pass
    sync_expert_gradients(unwrap(model), mesh)
    model.zero_grad()
    with listen() as sent:
        for micro in range(micro_batches):
            if micro < micro_batches - 1:
                with no_sync(model):
                    model(torch.randn(5, DIM)).backward()
            else:
                model(torch.randn(5, DIM)).backward()
        sync_expert_gradients(unwrap(model), mesh)
        clip_grad_norm(unwrap(model), 1.0, mesh)
    return Counter((m.operation, m.what.split(": ")[-1]) for m in sent)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_a_step_sends(pool4: Pool, micro_batches: int) -> None:
    """Per layer and micro-batch one matrix of counts, one sum of statistics, two exchanges each way; per step one
    bucket of dense gradients, one norm, and one message of each layer's experts to the other replica."""
    for seen in pool4.run(messages, {"ep_size": 2}, micro_batches):
        passes = LAYERS * micro_batches
        assert seen == {
            ("all_gather", "gathering counts"): passes,
            ("all_reduce", "summing statistics"): passes,
            ("all_to_all", "sending tokens to experts"): 2 * passes,
            ("all_to_all", "returning tokens from experts"): 2 * passes,
            ("all_reduce", "summing dense gradients"): 1,
            ("all_reduce", "summing expert gradients over replicas"): LAYERS,
            ("all_reduce", "clipping"): 1,
        }


def when_replicas_are_summed(checkpointed: bool) -> list[str]:
    """Order of experts' backward passes and of the sums that follow them."""
    model, mesh = spread(ep_size=2)
    events: list[str] = []
    stack = unwrap(model)
    for number, layer in enumerate(stack.sparse):
        function = layer.experts.function

        def experts(training: bool, function: Any = function, number: int = number) -> Any:
            def run(rows: Tensor, segments: Tensor | None, weights: Any) -> Tensor:
                done: Tensor = function(training)(rows, segments, weights)
                done.register_hook(lambda _: events.append(f"experts {number}"))
                return done

            return run

        layer.experts.function = experts
    genuine = replicas.GradientSum.__init__

    def noting(self: Any, parameters: Any, group: Any, what: str) -> None:
        events.append(f"sum {what.split(':')[0].split('.')[-1]}" if ":" in what else "rest")
        genuine(self, parameters, group, what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas.GradientSum, "__init__", noting)
        if checkpointed:
            recomputing(stack)
        model(torch.randn(5, DIM)).backward()
        before_sync = list(events)
        sync_expert_gradients(stack, mesh)
    assert len([event for event in events if event.startswith("sum")]) == LAYERS
    return before_sync


def recomputing(stack: Any) -> None:
    """Every layer's `carry` is recomputed in the backward pass."""
    from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

    for layer in stack.sparse:
        carry = layer.carry

        def again(*arguments: Any, carry: Any = carry) -> Tensor:
            with set_checkpoint_early_stop(False):
                y: Tensor = checkpoint(carry, *arguments, use_reentrant=False)
            return y

        layer.carry = again


@pytest.mark.parametrize("checkpointed", [False, True])
def test_replicas_are_summed_while_earlier_layers_are_still_to_come(pool4: Pool, checkpointed: bool) -> None:
    for events in pool4.run(when_replicas_are_summed, checkpointed):
        assert events == ["experts 2", "sum 2", "experts 1", "sum 1", "experts 0", "sum 0"]


def forgotten() -> str:
    model, _ = spread(ep_size=2)
    model(torch.randn(5, DIM)).backward()
    try:
        model(torch.randn(5, DIM)).backward()
    except DistributedError as error:
        return str(error)
    return ""


def test_a_forgotten_sum_is_named(pool4: Pool) -> None:
    for message in pool4.run(forgotten):
        assert "another training pass began before sync_expert_gradients was called" in message


def experts_alone() -> float:
    """Only experts are trained: DDP has nothing to do. Largest difference between replicas after the sum."""
    torch.manual_seed(0)
    model = Stack()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts." in name)
    mesh = make_mesh(ParallelConfig(ep_size=2), 4)
    apply_expert_parallel(model, mesh)
    wrapped = wrap_data_parallel(model, mesh)
    torch.manual_seed(mesh.rank)
    wrapped(torch.randn(5, DIM)).backward()
    sync_expert_gradients(model, mesh)
    gradient = model.sparse[0].experts.fc1_weight.grad
    gathered = [torch.empty_like(gradient) for _ in range(2)]
    torch.distributed.all_gather(gathered, gradient, group=mesh.replica_group)
    assert bool(gradient.any())
    return float((gathered[0] - gathered[1]).abs().max())


def test_experts_alone_can_be_trained(pool4: Pool) -> None:
    assert pool4.run(experts_alone) == [0.0] * 4
