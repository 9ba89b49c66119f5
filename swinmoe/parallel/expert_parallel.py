"""Spreads the experts of a finished model over the ranks of a mesh."""

from __future__ import annotations

import torch
from torch import nn

from swinmoe.errors import ConfigError
from swinmoe.moe.layer import MoEMlp
from swinmoe.parallel.execution import ExpertParallelExecution, ReplicatedExecution
from swinmoe.parallel.expert_parameter import ExpertParameter, is_expert_parameter
from swinmoe.parallel.mesh import Mesh


def apply_expert_parallel(model: nn.Module, mesh: Mesh) -> None:
    """Cut every `MoEMlp` of `model` down to this rank's experts, in place, and let its rows travel to the others.

    Call it on a model with its whole initial or loaded weights (equal on all ranks), before the optimiser is made:
    spread parameters are new objects. With `ep_size` 1 all experts stay, and only balance losses learn of the other
    ranks. Models made by `copy.deepcopy` afterwards (an EMA) stay spread in the same way.

    Raises:
        ConfigError: `mesh.ep_size` does not divide a layer's number of experts, or the model is spread already.
    """
    if mesh.world == 1:
        return
    for name, layer in model.named_modules():
        if not isinstance(layer, MoEMlp):
            continue
        if mesh.ep_size == 1:
            layer.execution = ReplicatedExecution(mesh)
            continue
        _keep_local_experts(layer.experts, layer.num_experts, mesh, name)
        layer.execution = ExpertParallelExecution(mesh, name or "expert layer")


@torch.no_grad()
def _keep_local_experts(experts: nn.Module, num_experts: int, mesh: Mesh, layer: str) -> None:
    if num_experts % mesh.ep_size:
        raise ConfigError(
            f"parallel.ep_size={mesh.ep_size} does not divide the {num_experts} experts of layer {layer!r}; use an "
            "ep_size that divides every layer's number of experts"
        )
    local = num_experts // mesh.ep_size
    first = mesh.ep_rank * local
    for module in experts.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_expert_parameter(parameter):
                raise ConfigError(f"layer {layer!r} is spread over processes already; spread a model once")
            assert parameter.shape[0] == num_experts, (
                f"{layer}: {name} {tuple(parameter.shape)} is not stacked by expert"
            )
            # A clone, so that the memory of the experts that live elsewhere is given back.
            kept = parameter[first : first + local].clone()
            setattr(module, name, ExpertParameter(kept, parameter.requires_grad))
