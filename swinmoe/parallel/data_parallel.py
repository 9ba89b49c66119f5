"""Data parallelism by summing gradients: DDP's buckets and overlap, a sum in place of its mean.

Each rank's loss is (sum over its own samples)/(number of samples on all ranks), so the sum of the ranks' gradients is
the gradient of the global batch, whatever the ranks' shares are. Expert parameters stay out of DDP: the all-to-all has
brought them the gradients of their whole expert group already, and only replicas are left to be summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swinmoe.comm import all_reduce_min, all_reduce_sum
from swinmoe.comm.failure import naming
from swinmoe.comm.traffic import note_all_reduce
from swinmoe.moe.layer import MoEMlp
from swinmoe.parallel.expert_parameter import expert_parameter_names, is_expert_parameter
from swinmoe.parallel.fsdp import is_sharded, only_accumulating, shard_dense
from swinmoe.parallel.mesh import Mesh
from swinmoe.parallel.replicas import GradientSum, SummedOverReplicas

Prepare = Callable[[nn.Module], nn.Module]


def wrap_data_parallel(model: nn.Module, mesh: Mesh, accelerator_prepare: Prepare | Any = None) -> nn.Module:
    """`model` ready for training on all ranks: its dense gradients are summed over the world during the backward pass.

    Args:
        model: after `apply_expert_parallel`.
        mesh: this rank's place.
        accelerator_prepare: an Accelerator, or a function such as its `prepare_model`, which places the model on its
            device and wraps it in DDP; it must not register a communication hook of its own. None = plain DDP.
            With `parallel.shard_dense` it is not asked: FSDP2 takes DDP's place, and the model is where it belongs.
    """
    prepare = getattr(accelerator_prepare, "prepare_model", accelerator_prepare)
    if mesh.world == 1:
        return model if prepare is None else prepare(model)
    if mesh.config.shard_dense:
        shard_dense(model, mesh)
        return model
    if not any(p.requires_grad and not is_expert_parameter(p) for p in model.parameters()):
        # Experts alone are trained: DDP has nothing to do, and refuses such a model.
        place = getattr(accelerator_prepare, "prepare_model", None)
        return model if place is None else place(model, evaluation_mode=True)
    # DDP reads this attribute of the module it wraps, whoever wraps it.
    model._ddp_params_and_buffers_to_ignore = sorted(expert_parameter_names(model))  # type: ignore[assignment]
    with naming("comparing the model's parameters over all ranks", amid_other_work=True):
        if prepare is None:
            wrapped: nn.Module = DistributedDataParallel(model, gradient_as_bucket_view=True)
        else:
            wrapped = prepare(model)
    assert isinstance(wrapped, DistributedDataParallel), f"{type(wrapped).__name__} is not DDP, on {mesh.world} ranks"
    # Routers keep their buffers equal on all ranks themselves, once per optimiser step. The attribute and not the
    # argument: torch 2.14 renames the argument, and Accelerate knows its old name only.
    wrapped.broadcast_buffers = False
    wrapped.register_comm_hook(mesh.world_group, _sum_bucket)
    return wrapped


# Untyped: DDP compares the hook's annotations with its own classes, and here annotations are strings.
def _sum_bucket(group, bucket):  # type: ignore[no-untyped-def]
    """DDP's communication hook: the default one divides by the number of ranks first."""
    summed = bucket.buffer()
    note_all_reduce(summed, group, "summing dense gradients")
    work = dist.all_reduce(summed, group=group, async_op=True)
    assert work is not None
    # `value` raises what went wrong; of a group that only pretends (`swinmoe plan --dry-run`) it is None.
    return work.get_future().then(lambda done: (done.value() or [summed])[0])


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, or `model` itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Within it a backward pass only accumulates: for all micro-batches of a step but the last."""
    layers = _summed_layers(model)
    for layer in layers:
        layer.paused = True
    try:
        with _without_sums(model):
            yield
    finally:
        for layer in layers:
            layer.paused = False


def _without_sums(model: nn.Module) -> AbstractContextManager[None]:
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return only_accumulating(model) if is_sharded(model) else nullcontext()


@torch.no_grad()
def sync_expert_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Sum expert gradients over replicas, in place, once per optimiser step after its last backward pass.

    Most of it is under way already (`swinmoe.parallel.replicas`). Missing gradients count as zeros, so that all ranks
    send the same messages.
    """
    if mesh.replica_group is None:
        return
    layers = _summed_layers(model)
    seen = {id(parameter) for layer in layers for parameter in layer.parameters}
    others = [p for p in model.parameters() if is_expert_parameter(p) and id(p) not in seen]
    rest = GradientSum(others, mesh.replica_group, "summing expert gradients over replicas")
    for layer in layers:
        layer.finish()
    rest.finish()


def _summed_layers(model: nn.Module) -> list[SummedOverReplicas]:
    executions = (module.execution for module in model.modules() if isinstance(module, MoEMlp))
    return [execution for execution in executions if isinstance(execution, SummedOverReplicas)]


@torch.no_grad()
def global_min(tensor: Tensor, mesh: Mesh, what: str = "a minimum over all ranks") -> Tensor:
    """The smallest of each element over all ranks; a new tensor (`tensor` itself on one process)."""
    return all_reduce_min(tensor.detach(), mesh.world_group, what)


@torch.no_grad()
def global_sum(tensor: Tensor, mesh: Mesh, what: str = "a sum over all ranks") -> Tensor:
    """The sum of `tensor` over all ranks, without a gradient; a new tensor (`tensor` itself on one process)."""
    return all_reduce_sum(tensor.detach(), mesh.world_group, what)
