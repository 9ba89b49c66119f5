"""Parameters that hold a part of the experts, and their way between part and whole.

Shapes: E experts counted globally, W = ep_size ranks share them. E ≥ W: each rank holds e = E/W experts whole. E < W:
each expert is cut into r = W/E slices along one axis of each parameter, and rank g·r + i holds slice i of expert g.
The leading axis of an expert parameter counts experts either way (e, or 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swinmoe.comm import all_gather_rows
from swinmoe.parallel.cut import cut_of, join_rows, local_part
from swinmoe.parallel.mesh import Mesh


class ExpertParameter(nn.Parameter):
    """A parameter whose values differ between the ranks of an expert group.

    A type and not an attribute of any parameter, because attributes are lost when one is deep-copied (as for an EMA).
    """

    slices: int
    """r, slices that each expert is cut into; 1 = none."""
    axis: int
    """Axis that is cut."""

    def __new__(cls, data: Tensor, requires_grad: bool = True, slices: int = 1, axis: int = 0) -> ExpertParameter:
        """Args: data: this rank's part."""
        parameter: ExpertParameter = torch.Tensor._make_subclass(cls, data, requires_grad)
        parameter.slices, parameter.axis = slices, axis
        return parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParameter:
        if id(self) not in memo:
            data = self.data.clone(memory_format=torch.preserve_format)
            memo[id(self)] = ExpertParameter(data, self.requires_grad, self.slices, self.axis)
        copied: ExpertParameter = memo[id(self)]
        return copied


def is_expert_parameter(parameter: Tensor) -> bool:
    """True for a parameter spread over an expert group. Experts that every rank holds whole are like dense weights."""
    return isinstance(parameter, ExpertParameter)


def expert_parameter_names(model: nn.Module) -> set[str]:
    """Names (as in `named_parameters`) of the parameters spread over an expert group."""
    return {name for name, parameter in model.named_parameters() if is_expert_parameter(parameter)}


def join_slices(parts: Tensor, slices: int, axis: int) -> Tensor:
    """Parts (n, e, ...) of n ranks in rank order -> their experts whole, (n·e/slices, ...); a view where it can be."""
    if slices == 1:
        return parts.flatten(0, 1)
    assert parts.shape[1] == 1, f"a rank that holds slices holds those of one expert, not {parts.shape[1]}"
    by_expert: Tensor = parts.unflatten(0, (-1, slices)).squeeze(2)  # (experts, slices, ...)
    return by_expert.movedim(1, axis).flatten(axis, axis + 1)


def cut_part(whole: Tensor, rank: int, size: int, slices: int, axis: int) -> Tensor:
    """Part of `rank` of `size` ranks in the whole (E, ...): its experts, or its slice of one; a view."""
    if slices == 1:
        local = whole.shape[0] // size
        return whole.narrow(0, rank * local, local)
    expert, piece = divmod(rank, slices)
    width = whole.shape[axis] // slices
    return whole.narrow(0, expert, 1).narrow(axis, piece * width, width)


def _spread(tensor: Tensor, parameter: Tensor, mesh: Mesh) -> ExpertParameter | None:
    # Optimiser states hold scalars too (AdamW's step count): those are no part of anything.
    spread = mesh.ep_size > 1 and isinstance(parameter, ExpertParameter) and tensor.dim() > 0
    return parameter if spread and isinstance(parameter, ExpertParameter) else None


def gather_full(tensor: Tensor, parameter: Tensor, mesh: Mesh) -> Tensor:
    """The whole (E, ...) of this rank's part, on every rank; `tensor` itself where nothing is spread.

    `tensor` is `parameter` or something of its shape (a gradient, a moment, an average). A collective over the expert
    group for expert parameters, over all ranks for what FSDP2 has cut: every rank must ask in the same order.
    """
    cut = cut_of(tensor)
    if cut is not None:
        return join_rows(local_part(tensor), cut, mesh)
    spread = _spread(tensor, parameter, mesh)
    if spread is None:
        return tensor
    parts = all_gather_rows(tensor.unsqueeze(0), mesh.ep_group)
    return join_slices(parts, spread.slices, spread.axis)


def take_local(full: Tensor, parameter: Tensor, mesh: Mesh) -> Tensor:
    """This rank's part of a whole (E, ...), as a view; `full` itself where nothing is spread.

    Of a parameter that FSDP2 has cut: the rows that belong into its `local_part`.
    """
    cut = cut_of(parameter)
    if cut is not None:
        return full.narrow(0, cut.first, local_part(parameter).shape[0])
    spread = _spread(full, parameter, mesh)
    if spread is None:
        return full
    part = cut_part(full, mesh.ep_rank, mesh.ep_size, spread.slices, spread.axis)
    assert part.shape == parameter.shape, (full.shape, parameter.shape, mesh.ep_size)
    return part
