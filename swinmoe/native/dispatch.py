"""Tokens to rows and back by kernels of our own (`dispatch.cpp`): each is one walk over memory, or over indices.

Shapes: T tokens, K choices each, E experts, M rows, D width; features are float32, indices int64. No autograd.

Torch's operators make many small passes of the indices, and of the features two or three large ones, which together
take as long as a thirtieth of the experts' own work on a CPU. All but one are no operators of torch: graphs have
torch's own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from swinmoe.native.build import kernels, why_no_kernels
from swinmoe.native.operators import address, define, expect, expect_numbers, finish

_OUTSIDE = 2
"""What the kernels say of an index that is none."""


def can_walk(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels here may be given these as features (of `dtype` int64: as indices): they lie in a CPU's
    memory, outside graphs, and there is a compiler."""
    plain = all(t.device.type == "cpu" and type(t) is Tensor and t.dtype == dtype for t in tensors)
    return plain and not torch.compiler.is_compiling() and not why_no_kernels()


def line_up(expert_ids: Tensor, turn: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor]:
    """Each choice's place in its expert's queue, (T, K), and the queues' lengths, (E,).

    Args:
        expert_ids: (T, K).
        turn: (T,) tokens in the order in which they line up; None = their own.
        num_experts: E.

    Raises:
        ValueError: an expert or a token that is not there, or other numbers or shapes than these.
    """
    tokens, choices = _two_axes(expert_ids=expert_ids)
    _expect_indices(expert_ids=(expert_ids, (tokens, choices)), turn=(turn, (tokens,)))
    expert_ids, turn = expert_ids.contiguous(), None if turn is None else turn.contiguous()
    slot, length = torch.empty_like(expert_ids), expert_ids.new_zeros(num_experts)
    _call(
        kernels().swinmoe_line_up,
        (tokens, choices, num_experts),
        (expert_ids, turn, slot, length),
        f"an expert's number is not in [0, {num_experts}), or a turn not in [0, {tokens})",
    )
    return slot, length


def give_rows(
    expert_ids: Tensor, slot: Tensor, kept: Tensor | None, first: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """The choice t·K + k in each row, (M,), -1 in those without, and the row of each choice, (T, K), 0 if dropped.

    Args:
        expert_ids, slot: (T, K), as `line_up` takes and gives them.
        kept: (T, K) bool; None = all.
        first: (E,), each expert's first row.
        num_rows: M.

    Raises:
        ValueError: a choice's row is not among the M, or other numbers or shapes than these.
    """
    shape = _two_axes(expert_ids=expert_ids)
    kept = _flags(kept, shape)
    _expect_indices(expert_ids=(expert_ids, shape), slot=(slot, shape), first=(first, (first.numel(),)))
    expert_ids, slot, first = expert_ids.contiguous(), slot.contiguous(), first.contiguous()
    row, position = expert_ids.new_empty(num_rows), torch.empty_like(expert_ids)
    _call(
        kernels().swinmoe_give_rows,
        (expert_ids.numel(), first.numel(), num_rows),
        (expert_ids, slot, kept, first, row, position),
        f"a choice's row is not in [0, {num_rows})",
    )
    return row, position


def take_rows(x: Tensor, row: Tensor, choices: int) -> Tensor:
    """(T, D) -> (M, D): the token of each row; zeros in rows without.

    Args:
        row: (M,), as `give_rows` gives it.
        choices: K.

    Raises:
        ValueError: a choice that is not there, or other numbers or shapes than these.
    """
    tokens, dim = _two_axes(x=x)
    expect_numbers(x=x)
    _expect_indices(row=(row, (row.numel(),)))
    expect(choices > 0, f"each token has {choices} choices; it must have 1 or more")
    x, row = x.contiguous(), row.contiguous()
    out = x.new_empty(len(row), dim)
    _call(
        kernels().swinmoe_take_rows,
        (tokens, choices, len(row), dim, torch.get_num_threads()),
        (row, x, out),
        f"a row's choice is not below {tokens * choices}",
    )
    return out


def sum_choices(rows: Tensor, position: Tensor, kept: Tensor | None, weights: Tensor | None) -> Tensor:
    """(M, D) -> (T, D): each token's kept choices' rows added up, each times its weight.

    Args:
        position: (T, K), as `give_rows` gives it.
        kept: (T, K) bool; None = all.
        weights: (T, K); None = 1.

    Raises:
        ValueError: a row that is not there, or other numbers or shapes than these.
    """
    (num_rows, dim), (tokens, choices) = _two_axes(rows=rows), _two_axes(position=position)
    expect_numbers(rows=rows, weights=weights)
    _expect_weights(weights, (tokens, choices))
    _expect_indices(position=(position, (tokens, choices)))
    rows, position, kept = rows.contiguous(), position.contiguous(), _flags(kept, (tokens, choices))
    weights = None if weights is None else weights.contiguous()
    out = rows.new_empty(tokens, dim)
    _call(
        kernels().swinmoe_sum_choices,
        (tokens, choices, num_rows, dim, torch.get_num_threads()),
        (position, kept, weights, rows, out),
        f"a choice's row is not in [0, {num_rows})",
    )
    return out


def sum_choices_backward(
    grad: Tensor,
    rows: Tensor,
    row: Tensor,
    position: Tensor,
    kept: Tensor | None,
    weights: Tensor,
    *,
    needs_rows: bool,
    needs_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Of the gradients (T, D) of `sum_choices`, those of rows (M, D) and weights (T, K); None where nobody needs them.

    Args:
        grad: (T, D).
        rows, position, kept, weights: as `sum_choices` takes them.
        row: (M,), as `give_rows` gives it: rows without a choice have gradients of zero.

    Raises:
        ValueError: a row that is not there, or other numbers or shapes than these.
    """
    (num_rows, dim), (tokens, choices) = _two_axes(rows=rows), _two_axes(position=position)
    expect_numbers(grad=grad, rows=rows, weights=weights)
    _expect_weights(weights, (tokens, choices))
    expect(grad.shape == (tokens, dim), f"grad of shape {tuple(grad.shape)} must be {(tokens, dim)}")
    _expect_indices(row=(row, (num_rows,)), position=(position, (tokens, choices)))
    grad, rows, weights = grad.contiguous(), rows.contiguous(), weights.contiguous()
    row, position, kept = row.contiguous(), position.contiguous(), _flags(kept, (tokens, choices))
    grad_rows = torch.empty_like(rows) if needs_rows else None
    grad_weights = torch.empty_like(weights) if needs_weights else None
    _call(
        kernels().swinmoe_sum_choices_backward,
        (tokens, choices, num_rows, dim, torch.get_num_threads()),
        (position, kept, row, weights, grad, rows, grad_rows, grad_weights),
        f"a choice's row is not in [0, {num_rows})",
    )
    return grad_rows, grad_weights


def add_product(x: Tensor, factors: Tensor, weight: Tensor) -> Tensor:
    """(T, D) + (T, E) (E, D): a gate's gradient of tokens, joined with the others'.

    Args:
        x: (T, D).
        factors: (T, E), few.
        weight: (E, D).

    Raises:
        ValueError: other numbers or shapes than these.
    """
    joined: Tensor = torch.ops.swinmoe.add_product(x, factors, weight)
    return joined


def _add_product(x: Tensor, factors: Tensor, weight: Tensor) -> Tensor:
    (tokens, dim), (_, few) = _two_axes(x=x), _two_axes(factors=factors)
    expect_numbers(x=x, factors=factors, weight=weight)
    fits = factors.shape == (tokens, few) and weight.shape == (few, dim)
    expect(fits, f"factors {tuple(factors.shape)} and weight {tuple(weight.shape)} make no {tuple(x.shape)}")
    x, factors, weight = x.contiguous(), factors.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    _call(kernels().swinmoe_add_product, (tokens, few, dim, torch.get_num_threads()), (x, factors, weight, out), "")
    return out


# An operator of torch, so that its FLOPs are counted where those of a product of torch's would have been.
define(
    "add_product",
    "(Tensor x, Tensor factors, Tensor weight) -> Tensor",
    _add_product,
    lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
)


@register_flop_formula(torch.ops.swinmoe.add_product)
def _flops(x: Any, factors: Sequence[int], weight: Sequence[int], *_: Any, out_val: Any = None, **__: Any) -> int:
    """Of the product."""
    return 2 * factors[0] * factors[1] * weight[1]


def _call(kernel: Callable[..., int], sizes: tuple[int, ...], tensors: tuple[Tensor | None, ...], outside: str) -> None:
    status = kernel(*map(ctypes.c_int64, sizes), *map(address, tensors))
    expect(status != _OUTSIDE, outside)
    finish(status)


def _two_axes(**tensors: Tensor) -> tuple[int, int]:
    ((name, t),) = tensors.items()
    expect(t.dim() == 2, f"{name} of shape {tuple(t.shape)} must have two axes")
    return t.shape[0], t.shape[1]


def _expect_indices(**tensors: tuple[Tensor | None, Any]) -> None:
    for name, (t, shape) in tensors.items():
        if t is not None:
            expect(t.shape == shape, f"{name} of shape {tuple(t.shape)} must be {shape}")
            fits = t.dtype == torch.int64 and t.device.type == "cpu"
            expect(fits, f"{name} is {t.dtype} on {t.device}; our kernels take int64 on a CPU alone")


def _expect_weights(weights: Tensor | None, shape: tuple[int, int]) -> None:
    fits = weights is None or weights.shape == shape
    expect(fits, f"weights of shape {() if weights is None else tuple(weights.shape)} must be {shape}")


def _flags(kept: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    if kept is None:
        return None
    fits = kept.dtype == torch.bool and kept.shape == shape and kept.device.type == "cpu"
    expect(fits, f"kept is {kept.dtype} of shape {tuple(kept.shape)} on {kept.device}; it must be bool {shape}, here")
    return kept.contiguous()
