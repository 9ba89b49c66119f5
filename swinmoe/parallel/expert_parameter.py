"""Parameters that hold a slice of the experts, and their way between slice and whole.

Shapes: E experts counted globally, e = E/ep_size held here; the leading axis of an expert parameter counts experts.
"""

from __future__ import annotations

from torch import Tensor, nn

from swinmoe.comm import all_gather_rows
from swinmoe.parallel.mesh import Mesh


class ExpertParameter(nn.Parameter):
    """A parameter (e, ...) whose values differ between the ranks of an expert group.

    A type and not an attribute, because an attribute is lost when a parameter is deep-copied (as for an EMA).
    """


def is_expert_parameter(parameter: Tensor) -> bool:
    """True for a parameter spread over an expert group. Experts that every rank holds whole are like dense weights."""
    return isinstance(parameter, ExpertParameter)


def expert_parameter_names(model: nn.Module) -> set[str]:
    """Names (as in `named_parameters`) of the parameters spread over an expert group."""
    return {name for name, parameter in model.named_parameters() if is_expert_parameter(parameter)}


def _is_spread(tensor: Tensor, parameter: Tensor, mesh: Mesh) -> bool:
    # Optimiser states hold scalars too (AdamW's step count): those are no slice of anything.
    return mesh.ep_size > 1 and is_expert_parameter(parameter) and tensor.dim() > 0


def gather_full(tensor: Tensor, parameter: Tensor, mesh: Mesh) -> Tensor:
    """The whole (E, ...) of a local slice (e, ...), on every rank; `tensor` itself where nothing is spread.

    `tensor` is `parameter` or something of its shape (a gradient, a moment, an average). A collective over the expert
    group for expert parameters: every rank must ask in the same order.
    """
    if not _is_spread(tensor, parameter, mesh):
        return tensor
    return all_gather_rows(tensor, mesh.ep_group)


def take_local(full: Tensor, parameter: Tensor, mesh: Mesh) -> Tensor:
    """This rank's slice (e, ...) of a whole (E, ...), as a view; `full` itself where nothing is spread."""
    if not _is_spread(full, parameter, mesh):
        return full
    assert full.shape[0] == parameter.shape[0] * mesh.ep_size, (full.shape, parameter.shape, mesh.ep_size)
    return full.narrow(0, mesh.ep_rank * parameter.shape[0], parameter.shape[0])
