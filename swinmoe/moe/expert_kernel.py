"""Experts by our kernel in C++ (`swinmoe.native`): float32 on a CPU, GELU or ReLU.

Shapes: N rows ordered (source, local expert), S sources, e experts here, D width, F hidden width.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from swinmoe.moe.activations import Activation, Gelu, Relu
from swinmoe.moe.precision import autocast_dtype
from swinmoe.moe.types import ExpertWeights
from swinmoe.moe.weight_gradients import destination, graph_of_backward
from swinmoe.native import expert_mlp_backward, expert_mlp_forward, use_huge_pages, why_no_kernels

_NAMES: dict[type[Activation], Any] = {Gelu: "gelu", Relu: "relu"}
_one_at_a_time = threading.Lock()
"""Backward passes of several threads may add to one gradient; autograd's own addition has such a lock too."""


def takes(rows: Tensor, w: ExpertWeights, activation: Activation) -> bool:
    """Whether the kernel computes this; asks for a compiler only where all else fits."""
    if torch.compiler.is_compiling() or autocast_dtype(rows) not in (None, torch.float32):
        return False
    return not (_why_not(activation, rows) or why_not(w, activation))


def why_not(w: ExpertWeights, activation: Activation) -> str:
    """Why the kernel does not compute with these weights; "" where it does, for float32 rows outside graphs."""
    weights = [t for t in (w.fc1, w.b1, w.fc2, w.b2) if t is not None]
    found = _why_not(activation, *weights)
    if not found and not (w.fc1.is_contiguous() and w.fc2.is_contiguous()):
        found = "it takes contiguous weights, and they are laid out otherwise"
    return found or why_no_kernels()


def _why_not(activation: Activation, *tensors: Tensor) -> str:
    for t in tensors:
        if t.device.type != "cpu":
            return f"it is for CPUs, and they are on {t.device.type}"
        if t.dtype != torch.float32:
            return f"it takes float32, and they are {t.dtype}".replace("torch.", "")
        # Parameters may only know more about themselves; what stands for others (fake, or spread over ranks) may have
        # no numbers here, and it is their memory that is read.
        if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return f"it reads memory, and they are a {type(t).__name__}, whose numbers may lie elsewhere"
    if type(activation) not in _NAMES:
        return f"it has {' and '.join(_NAMES.values())} between the layers, and they {type(activation).__name__}"
    return ""


def kernel_mlp(
    rows: Tensor, counts: list[list[int]], w: ExpertWeights, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """fc2_e(dropout(activation(fc1_e(row)))) where `takes` says so; weight gradients as in `weight_gradients`.

    Units are dropped as one draw from the global generator says, so that recomputation drops the same.
    """
    tensors = (rows, w.fc1, w.b1, w.fc2, w.b2)
    # Inside `forward` gradient mode is off, whoever calls: ask here whether a backward pass can follow.
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    for weight in (w.fc1, w.fc2):
        if isinstance(weight, nn.Parameter):  # not what was gathered or cut for this pass
            use_huge_pages(weight, move=training and weight.requires_grad)
    seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_(-(2**63), None)) if dropout else 0
    out: Tensor = _KernelMlp.apply(*tensors, counts, _NAMES[type(activation)], dropout, seed, training)
    return out


class _KernelMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        fc1: Tensor,
        b1: Tensor | None,
        fc2: Tensor,
        b2: Tensor | None,
        counts: list[list[int]],
        activation: Any,
        dropout: float,
        seed: int,
        training: bool,
    ) -> Tensor:
        out, pre = expert_mlp_forward(rows, counts, fc1, b1, fc2, b2, activation, training, dropout, seed)
        if training:
            ctx.save_for_backward(rows, fc1, fc2, *pre)
            # Saved tensors may come back as copies (checkpointing, offloading); only the parameter itself has `.grad`.
            # Gathered weights are no parameters, and to keep them would undo what checkpointing saves.
            # One that is both weights at once would be written from two sides.
            ctx.parameters = tuple(weight if weight.is_leaf and fc1 is not fc2 else None for weight in (fc1, fc2))
            ctx.counts, ctx.activation, ctx.dropout = counts, activation, (dropout, seed)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad, ctx.creates_graph = graph_of_backward(grad)
        return _backward(ctx, grad)


@once_differentiable
def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, fc1, fc2, *pre = ctx.saved_tensors
    needs_rows, needs_fc1, needs_b1, needs_fc2, needs_b2 = ctx.needs_input_grad[:5]
    grad_rows = rows.new_empty(rows.shape) if needs_rows else None
    of_fc1 = _Destination(fc1, ctx.parameters[0], ctx.creates_graph) if needs_fc1 else None
    of_fc2 = _Destination(fc2, ctx.parameters[1], ctx.creates_graph) if needs_fc2 else None
    grad_b1 = rows.new_zeros(fc1.shape[:2]) if needs_b1 else None
    grad_b2 = rows.new_zeros(fc2.shape[:2]) if needs_b2 else None
    add_fc1, add_fc2 = (g is not None and g.adds for g in (of_fc1, of_fc2))
    with _one_at_a_time if add_fc1 or add_fc2 else nullcontext():
        expert_mlp_backward(
            grad,
            rows,
            ctx.counts,
            fc1,
            fc2,
            pre,
            ctx.activation,
            *ctx.dropout,
            grad_x=grad_rows,
            grad_fc1=None if of_fc1 is None else of_fc1.written,
            grad_b1=grad_b1,
            grad_fc2=None if of_fc2 is None else of_fc2.written,
            grad_b2=grad_b2,
            add_fc1=add_fc1,
            add_fc2=add_fc2,
        )
    found = [None if g is None else g.result() for g in (of_fc1, of_fc2)]
    return grad_rows, found[0], grad_b1, found[1], grad_b2, None, None, None, None, None


class _Destination:
    """Contiguous memory for a weight's gradient: where it belongs, or, where that is laid out otherwise, beside it."""

    def __init__(self, weight: Tensor, parameter: Tensor | None, creates_graph: bool) -> None:
        self.stack, self.in_place = destination(weight, parameter, creates_graph)
        new = torch.contiguous_format
        self.written = self.stack if self.stack.is_contiguous() else torch.empty_like(weight, memory_format=new)
        self.adds = self.in_place and self.written is self.stack

    def result(self) -> Tensor | None:
        """What the backward pass returns: None where `.grad` has it all."""
        if self.adds:
            increment_version(self.stack)  # what autograd cannot see, for graphs that hold this gradient
        if self.written is not self.stack:
            self.stack.add_(self.written)  # only `.grad` is ever laid out otherwise
        return None if self.in_place else self.stack
