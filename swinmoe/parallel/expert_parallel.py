"""Spreads the experts of a finished model over the ranks of a mesh."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from swinmoe.config import ParallelConfig
from swinmoe.errors import ConfigError
from swinmoe.moe.layer import MoEMlp
from swinmoe.parallel.execution import make_execution
from swinmoe.parallel.expert_parameter import ExpertParameter, cut_part, is_expert_parameter
from swinmoe.parallel.mesh import Mesh
from swinmoe.parallel.replicas import SummedOverReplicas


def apply_expert_parallel(model: nn.Module, mesh: Mesh) -> None:
    """Cut every `MoEMlp` of `model` down to this rank's part of its experts, in place, and let rows meet the others.

    Call it on a model with its whole initial or loaded weights (equal on all ranks), before the optimiser is made:
    spread parameters are new objects. With `ep_size` 1 all experts stay, and only balance losses learn of the other
    ranks. Models made by `copy.deepcopy` afterwards (an EMA) stay spread in the same way. A collective call.

    Raises:
        ConfigError: a layer's experts cannot be spread over `mesh.ep_size` ranks, or the model is spread already.
    """
    if mesh.world == 1:
        return
    if mesh.ep_size > 1:
        for name, layer in _layers(model):
            _keep_local_experts(layer, mesh, name)
    use_exchange(model, mesh, mesh.config)


def use_exchange(model: nn.Module, mesh: Mesh, config: ParallelConfig) -> None:
    """Let tokens and weights of a spread model travel as `config` says; parameters stay where they are.

    Between steps it may be called any number of times; results are the same. A collective call.

    Raises:
        ConfigError: `config` has another `ep_size` than the mesh, or does not fit a layer's number of experts.
    """
    if mesh.world == 1:
        return
    if config.ep_size != mesh.ep_size:
        raise ConfigError(
            f"parallel.ep_size={config.ep_size} would move experts, which are spread over {mesh.ep_size} ranks; "
            f"between steps only the exchange can change: use ep_size={mesh.ep_size}"
        )
    for name, layer in _layers(model):
        config.check_experts(layer.num_experts, f"the experts of layer {name!r}")
        execution = make_execution(config, mesh, layer.num_experts, name or "expert layer")
        if mesh.ep_size > 1 and mesh.replica_group is not None:
            execution = SummedOverReplicas(execution, list(layer.experts.parameters()), mesh.replica_group, name)
        layer.execution = execution


def _layers(model: nn.Module) -> Iterator[tuple[str, MoEMlp]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, MoEMlp))


@torch.no_grad()
def _keep_local_experts(layer: MoEMlp, mesh: Mesh, name: str) -> None:
    mesh.config.check_experts(layer.num_experts, f"the experts of layer {name!r}")
    slices = mesh.slices(layer.num_experts)
    axes = getattr(layer.experts, "slice_axes", {}) if slices > 1 else {}
    for module in layer.experts.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if is_expert_parameter(parameter):
                raise ConfigError(f"layer {name!r} is spread over processes already; spread a model once")
            assert parameter.shape[0] == layer.num_experts, (
                f"{name}: {key} {tuple(parameter.shape)} is not stacked by expert"
            )
            axis = axes.get(key, 0)
            if slices > 1:
                _check_slices(layer, name, key, axis, parameter.shape[axis], mesh)
            # A clone, so that the memory of the experts that live elsewhere is given back.
            part = cut_part(parameter, mesh.ep_rank, mesh.ep_size, slices, axis)
            kept = part.clone(memory_format=torch.contiguous_format)
            setattr(module, key, ExpertParameter(kept, parameter.requires_grad, slices, axis))


def _check_slices(layer: MoEMlp, name: str, key: str, axis: int, width: int, mesh: Mesh) -> None:
    slices = mesh.slices(layer.num_experts)
    if axis == 0:
        raise ConfigError(
            f"layer {name!r}: experts of type {layer.cfg.experts.type!r} do not say how {key} is cut, so "
            f"{layer.num_experts} of them cannot be sliced over ep_size={mesh.ep_size} ranks; use an ep_size that "
            f"divides {layer.num_experts}, or give the class `slice_axes`"
        )
    # Rows of one hidden unit stay together (SwiGLU has two).
    together = layer.experts.activation.rows_per_hidden if key.startswith("fc1") else 1
    if (width // together) % slices:
        raise ConfigError(
            f"layer {name!r}: {key} has {width // together} along its axis {axis}, which cannot be cut into "
            f"{slices} equal slices ({layer.num_experts} experts on ep_size={mesh.ep_size} ranks); use a smaller "
            "ep_size, or widths that it divides"
        )
