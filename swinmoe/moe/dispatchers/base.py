"""Tokens -> rows and rows -> tokens: what the layouts share.

Shapes: T tokens, D width, K choices, M rows of the layout.

Both directions gather: a row takes its token's features, a token sums its choices' rows. Their gradients gather the
other way round along the same plan, where autograd would scatter with atomics or a slow row-by-row addition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swinmoe import native
from swinmoe.config.moe import CapacityPolicy
from swinmoe.moe.types import DispatchPlan, ExpertRows, Queues, Routing


class Dispatcher:
    """Carries tokens to expert rows and back. One of your own overrides all three methods; it owns no parameters."""

    def slots(self, queues: Queues, capacity: int | None, policy: CapacityPolicy) -> int | None:
        """Rows per expert if the layout is padded, else None."""
        raise NotImplementedError

    def scatter(self, x: Tensor, routing: Routing, plan: DispatchPlan) -> ExpertRows:
        """Tokens (T, D) -> expert rows."""
        raise NotImplementedError

    def gather(self, rows: Tensor, routing: Routing, plan: DispatchPlan) -> Tensor:
        """Expert outputs, laid out as `scatter` did -> tokens (T, D): Σ_k gate·row; a dropped choice adds nothing."""
        raise NotImplementedError


def take_rows(x: Tensor, plan: DispatchPlan) -> Tensor:
    """(T, D) -> (M, D): the token of each row; zeros in empty rows."""
    rows: Tensor = _TakeRows.apply(x, plan)
    return rows


def combine_rows(rows: Tensor, gates: Tensor, plan: DispatchPlan) -> Tensor:
    """(M, D), (T, K) -> (T, D): Σ_k gate_tk·row_tk over kept choices, in the dtype of `rows`."""
    y: Tensor = _CombineRows.apply(rows, gates.to(rows.dtype), plan)
    return y


def _tokens(plan: DispatchPlan) -> Tensor:
    """(M,) token of each row; that of an empty row is arbitrary."""
    top_k = plan.position.shape[1]
    filled = plan.row if plan.slots is None else plan.row.clamp(min=0)
    return filled if top_k == 1 else filled // top_k


def _sum_choices(rows: Tensor, weights: Tensor | None, plan: DispatchPlan) -> Tensor:
    """(M, D) -> (T, D): Σ_k weight_tk·row_tk; without weights kept choices count 1."""
    if plan.native and native.can_walk(rows):
        return native.sum_choices(rows, plan.position, plan.kept, weights)
    num_tokens, top_k = plan.position.shape
    if rows.shape[0] == 0:
        return rows.new_zeros(num_tokens, rows.shape[1])
    if plan.kept is not None:
        weights = plan.kept.to(rows.dtype) if weights is None else weights * plan.kept
    total = rows.index_select(0, plan.position[:, 0])
    if weights is not None:
        total *= weights[:, :1]
    for k in range(1, top_k):
        choice = rows.index_select(0, plan.position[:, k])
        total = total.add_(choice) if weights is None else total.addcmul_(choice, weights[:, k : k + 1])
    return total


def _weigh(grad: Tensor, gates: Tensor, plan: DispatchPlan) -> Tensor:
    """Of outputs' gradients (T, D) what each row gets: gate·grad[token] (M, D), 0 for empty rows."""
    weights = gates.reshape(-1)
    if plan.slots is None:
        weights = weights.index_select(0, plan.row)
    else:
        weights = weights.index_select(0, plan.row.clamp(min=0)) * (plan.row >= 0)
    return grad.index_select(0, _tokens(plan)).mul_(weights.unsqueeze(1))


def _slopes(grad: Tensor, rows: Tensor, plan: DispatchPlan) -> Tensor:
    """Of outputs' gradients (T, D) what each gate gets: <row, grad> (T, K), 0 for dropped choices."""
    by_row = grad.index_select(0, _tokens(plan))
    slopes = (rows * by_row).sum(-1)[plan.position]
    return slopes if plan.kept is None else slopes * plan.kept


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        if plan.native and native.can_walk(x):
            return native.take_rows(x, plan.row, plan.position.shape[1])
        if x.shape[0] == 0:
            return x.new_zeros(plan.row.shape[0], x.shape[1])
        rows = x.index_select(0, _tokens(plan))
        if plan.slots is not None:
            rows.masked_fill_((plan.row < 0).unsqueeze(1), 0)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_choices(grad, None, ctx.plan), None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gates: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(rows, gates)
        return _sum_choices(rows, gates, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, gates = ctx.saved_tensors
        plan: DispatchPlan = ctx.plan
        needs_rows, needs_gates = ctx.needs_input_grad[:2]
        if plan.native and native.can_walk(grad, rows, gates):
            indices = (plan.row, plan.position, plan.kept)
            wanted = {"needs_rows": needs_rows, "needs_weights": needs_gates}
            return *native.sum_choices_backward(grad, rows, *indices, gates, **wanted), None
        if len(grad) == 0 or len(rows) == 0:
            return torch.zeros_like(rows), torch.zeros_like(gates), None
        grad = grad.contiguous()
        grad_rows = _weigh(grad, gates, plan) if needs_rows else None
        return grad_rows, _slopes(grad, rows, plan) if needs_gates else None, None
