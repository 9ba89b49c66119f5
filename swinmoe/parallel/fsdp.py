"""FSDP2 for dense parameters, beside expert parallelism: each rank keeps a band of rows of every one of them.

A block's parameters are gathered before its forward and backward passes and given back after them; its gradients are
summed onto the ranks that keep the rows. So parameters, gradients and moments take 1/W of their bytes on each of W
ranks, for one gather more per pass than DDP has messages. Experts spread over ranks stay where they are; experts that
every rank would hold (`ep_size` 1) are dense parameters like others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swinmoe.comm import gather_into, sum_onto_owners
from swinmoe.comm.failure import naming
from swinmoe.errors import ConfigError
from swinmoe.models.block import SwinBlock
from swinmoe.models.patches import PatchMerging
from swinmoe.parallel.expert_parameter import is_expert_parameter
from swinmoe.parallel.mesh import Mesh

_UNITS = (SwinBlock, PatchMerging)
"""What is gathered at once; the rest of a model is one unit more."""
_GATHERING, _SUMMING = "FSDP2: gathering dense parameters", "FSDP2: summing dense gradients"


def gathered_units(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters that `shard_dense` lets travel together, by their module's name ("" = the rest), in the
    model's order; experts that are spread are in none."""
    places = [name for name, module in model.named_modules() if isinstance(module, _UNITS)]
    units: dict[str, list[str]] = {name: [] for name in [*places, ""]}
    for name, parameter in model.named_parameters():
        if not is_expert_parameter(parameter):
            units[next((place for place in places if name.startswith(f"{place}.")), "")].append(name)
    return units


class _Allocating:
    """Memory of what FSDP2 sends, as it takes it by itself."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Allocating):
    """FSDP2's gather, heard by `comm.listen` and named in errors."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        return gather_into(output_tensor, input_tensor, group, _GATHERING, waits=not async_op)


class _Scatter(_Allocating):
    """FSDP2's sum onto the ranks that keep the rows, likewise."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        assert op == dist.ReduceOp.SUM, f"gradients are summed, not {op}"
        return sum_onto_owners(output_tensor, input_tensor, group, _SUMMING, waits=not async_op)


def shard_dense(model: nn.Module, mesh: Mesh) -> None:
    """Cut the dense parameters of `model` over all ranks, in place, and let their gradients be summed.

    Call it on a spread model whose dense parameters are equal on all ranks, before its optimiser is made: parameters
    are new objects. Such a model cannot be copied: an average of it is cut by a call of its own. A collective call.

    Raises:
        ConfigError: a parameter that cannot be cut.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    experts = {p for p in model.parameters() if is_expert_parameter(p)}
    dense = [(name, p) for name, p in model.named_parameters() if p not in experts]
    scalar = next((name for name, p in dense if p.dim() == 0), None)
    if scalar is not None:
        raise ConfigError(
            f"parallel.shard_dense cuts parameters by rows, and {scalar!r} has none; give it the shape (1,), or set "
            "parallel.shard_dense=false"
        )
    ranks = init_device_mesh(dense[0][1].device.type, (mesh.world,))
    with naming("cutting dense parameters over all ranks", amid_other_work=True):
        for module in [*(m for m in model.modules() if isinstance(m, _UNITS)), model]:
            # The last gathered unit is given back too: between steps, parameters are what the optimiser knows.
            fully_shard(module, mesh=ranks, reshard_after_forward=True, ignored_params=experts)
    # Untyped: their base classes have no public name.
    gather: Any = _Gather()
    scatter: Any = _Scatter()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are local sums over global counts: gradients are summed. FSDP2 would take their mean, and sum by
            # an operation that multiplies by 1 first, which NCCL has alone.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_custom_all_gather(gather)
            module.set_custom_reduce_scatter(scatter)


def is_sharded(model: nn.Module) -> bool:
    """True after `shard_dense`."""
    return type(model).__name__.startswith("FSDP") and hasattr(model, "set_requires_gradient_sync")


@contextmanager
def only_accumulating(model: nn.Module) -> Iterator[None]:
    """Within it gradients stay, whole, on the rank that has them: for all micro-batches of a step but the last."""
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(model, FSDPModule), f"{type(model).__name__} went not through shard_dense"
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
