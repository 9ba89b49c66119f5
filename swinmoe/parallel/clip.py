"""Clipping by the global norm, the same on every rank.

The plain `torch.nn.utils.clip_grad_norm_` sees only this rank's experts; ranks then scale the dense gradients that they
share by different factors, and their copies of the dense weights drift apart (Swin-MoE's released code does so).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from swinmoe.comm import all_reduce_sum
from swinmoe.parallel.cut import is_cut, local_part
from swinmoe.parallel.expert_parameter import is_expert_parameter
from swinmoe.parallel.mesh import Mesh


def _square_sum(gradients: list[Tensor], like: Tensor) -> Tensor:
    """Σ g² over all gradients, () in `like`'s dtype; half-precision gradients are squared in float32."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_dtype[gradient.dtype].append(gradient)
    total = torch.zeros_like(like)
    for dtype, group in by_dtype.items():
        norms = torch._foreach_norm(group, 2.0, dtype=torch.promote_types(dtype, torch.float32))
        total += torch.stack(norms).to(total.dtype).square().sum()
    return total


@torch.no_grad()
def clip_grad_norm(model_or_params: nn.Module | Iterable[Tensor], max_norm: float | None, mesh: Mesh) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `max_norm`; a collective call, without a host sync.

    Call it after dense gradients are summed over the world and expert gradients over replicas. Dense gradients count
    once, and so does every expert, wherever it is, and every row of a gradient that is cut over ranks. One sum over
    the world makes the norm the same number on all ranks, bit by bit; so is a NaN or an infinity, and every rank can
    skip the step alike.

    Args:
        model_or_params: a model, or its parameters.
        max_norm: the bound; None = measure only. Scaled by max_norm/(norm + 1e-6), as torch does.

    Returns:
        The norm before clipping, () in the widest dtype of the gradients, float32 at least.

    Raises:
        CollectiveError: the sum failed or timed out.
    """
    parameters = model_or_params.parameters() if isinstance(model_or_params, nn.Module) else model_or_params
    dense: list[Tensor] = []
    experts: list[Tensor] = []
    rows: list[Tensor] = []  # of dense gradients that are cut
    for parameter in parameters:
        if parameter.grad is not None:
            kind = rows if is_cut(parameter) else experts if is_expert_parameter(parameter) else dense
            kind.append(local_part(parameter.grad))
    everything = dense + experts + rows
    dtype = torch.float32
    for gradient in everything:
        dtype = torch.promote_types(dtype, gradient.dtype)
    device = everything[0].device if everything else torch.device("cpu")
    total = torch.zeros((), dtype=dtype, device=device)
    if mesh.ep_size == 1 and not rows:
        total = _square_sum(everything, total)  # every rank has the same gradients
    else:
        if mesh.rank == 0:
            total = total + _square_sum(dense, total)
        if mesh.replica == 0:
            total = total + _square_sum(experts, total)
        total = total + _square_sum(rows, total)
        total = all_reduce_sum(total, mesh.world_group, "clipping")
    norm = total.sqrt()
    if max_norm is not None and everything:
        torch._foreach_mul_(everything, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
