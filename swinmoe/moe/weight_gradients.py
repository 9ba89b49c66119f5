"""Where the gradient of a stacked weight is written: straight into the parameter's `.grad` where that is safe.

Safe is: exactly what autograd's own accumulation would have done, and nobody who would have seen the gradient on its
way. So not under `autograd.grad`, `create_graph`, or tensor hooks; nor while there is no `.grad` yet, when autograd
takes our memory as it is (see `gradient_buffers`). Hooks of the accumulation node (DDP's) run after this and find
`.grad` complete.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from swinmoe.moe import gradient_buffers


def destination(weight: Tensor, parameter: Tensor | None, creates_graph: bool) -> tuple[Tensor, bool]:
    """Memory for the gradient of `weight`, and whether it is `.grad` itself, to which is to be added.

    Args:
        weight: (e, ...).
        parameter: whose `.grad` it becomes; None where it becomes nobody's.
        creates_graph: whether the backward pass is itself to be differentiated.

    Returns:
        Of the shape of `weight`; `.grad`, or contiguous memory with arbitrary values, which the backward pass returns.
    """
    gradient = None if parameter is None or creates_graph else _own_gradient(parameter)
    return (gradient_buffers.take(weight, parameter), False) if gradient is None else (gradient, True)


def _own_gradient(parameter: Tensor) -> Tensor | None:
    """`parameter.grad`, if adding to it is what autograd would do with a gradient returned now."""
    gradient = parameter.grad
    if gradient is None or gradient.requires_grad or gradient.layout != torch.strided:
        return None
    if type(gradient) is not Tensor or gradient.dtype != parameter.dtype:
        return None
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return None
    try:
        # False for a parameter left out of backward(inputs=...); an error under autograd.grad, which keeps off .grad.
        return gradient if torch._C._will_engine_execute_node(get_gradient_edge(parameter).node) else None
    except RuntimeError:
        return None


def graph_of_backward(grad: Tensor) -> tuple[Tensor, bool]:
    """The gradient that a backward pass was given, and whether that pass is itself to be differentiated.

    If it is, the gradient is one that needs gradients: only then does `once_differentiable` refuse, and what a pass
    returns depends on more than on what it was given.
    """
    creates_graph = torch.is_grad_enabled()
    return (grad.detach().requires_grad_() if creates_graph and not grad.requires_grad else grad), creates_graph
