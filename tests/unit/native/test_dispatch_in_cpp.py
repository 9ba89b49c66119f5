"""The kernels or loops over tokens and choices in float64: the same queues, rows, sums and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from swinmoe import native

pytestmark = pytest.mark.usefixtures("native_kernels")

TOKENS, EXPERTS = 11, 5


def chosen(top_k: int) -> Tensor:
    """(T, K); the last expert is chosen by nobody."""
    return torch.stack([torch.randperm(EXPERTS - 1)[:top_k] for _ in range(TOKENS)])


def layout(top_k: int, limit: int, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """row, position and kept of random choices whose queues end at `limit`."""
    ids = chosen(top_k)
    slot, routed = native.line_up(ids, None, EXPERTS)
    counts, kept = routed.clamp(max=limit), slot < limit
    first = torch.arange(EXPERTS) * limit if padded else counts.cumsum(0) - counts
    row, position = native.give_rows(ids, slot, kept, first, EXPERTS * limit if padded else int(counts.sum()))
    return row, position, kept


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_queues_are_those_of_a_loop(top_k: int, prioritized: bool) -> None:
    ids, turn = chosen(top_k), torch.randperm(TOKENS) if prioritized else None
    slot, length = native.line_up(ids, turn, EXPERTS)
    queues: list[list[tuple[int, int]]] = [[] for _ in range(EXPERTS)]
    for k in range(top_k):
        for t in range(TOKENS) if turn is None else turn.tolist():
            queues[int(ids[t, k])].append((t, k))
    assert length.tolist() == [len(q) for q in queues]
    assert all(int(slot[t, k]) == place for q in queues for place, (t, k) in enumerate(q))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_rows_and_places_are_each_others_inverse(top_k: int, padded: bool) -> None:
    limit = 4
    row, position, kept = layout(top_k, limit, padded)
    assert not kept.all(), "some were meant to be dropped"
    assert position[~kept].tolist() == [0] * int((~kept).sum())
    choices = torch.arange(TOKENS * top_k).view(TOKENS, top_k)
    assert torch.equal(row[position[kept]], choices[kept])
    assert (row < 0).any() == padded
    assert sorted(row[row >= 0].tolist()) == sorted(choices[kept].tolist())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [1, 16, 37])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_rows_sums_and_gradients_are_those_of_a_loop(top_k: int, padded: bool, width: int, threads: int) -> None:
    torch.set_num_threads(threads)
    row, position, kept = layout(top_k, 4, padded)
    x, grad = torch.randn(TOKENS, width), torch.randn(TOKENS, width)
    rows, weights = torch.randn(len(row), width), torch.rand(TOKENS, top_k)

    taken = torch.zeros(len(row), width, dtype=torch.float64)
    plain, weighted = (torch.zeros(TOKENS, width, dtype=torch.float64) for _ in range(2))
    grad_rows, grad_weights = torch.zeros_like(taken), torch.zeros(TOKENS, top_k, dtype=torch.float64)
    for t in range(TOKENS):
        for k in range(top_k):
            if kept[t, k]:
                at = int(position[t, k])
                taken[at] = x[t]
                plain[t] += rows[at]
                weighted[t] += weights[t, k] * rows[at].double()
                grad_rows[at] = weights[t, k] * grad[t].double()
                grad_weights[t, k] = grad[t].double() @ rows[at].double()

    assert torch.equal(native.take_rows(x, row, top_k).double(), taken)
    near: dict[str, Any] = {"check_dtype": False, "rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(native.sum_choices(rows, position, kept, None), plain, **near)
    torch.testing.assert_close(native.sum_choices(rows, position, kept, weights), weighted, **near)
    for needs in ((True, True), (True, False), (False, True)):
        wanted = {"needs_rows": needs[0], "needs_weights": needs[1]}
        found = native.sum_choices_backward(grad, rows, row, position, kept, weights, **wanted)
        assert [g is not None for g in found] == list(needs)
        for mine, other in zip(found, (grad_rows, grad_weights), strict=True):
            if mine is not None:
                torch.testing.assert_close(mine, other, **near)


@pytest.mark.parametrize("width", [256, 250])
def test_large_maps_go_past_the_caches(width: int) -> None:
    """2 MB and more, which are streamed if rows are whole vectors."""
    tokens = 2200
    place = torch.randperm(tokens)
    row, position = place.argsort(), place.unsqueeze(1)
    x, grad, weights = torch.randn(tokens, width), torch.randn(tokens, width), torch.rand(tokens, 1)
    rows = native.take_rows(x, row, 1)
    assert torch.equal(rows, x[row])
    assert torch.equal(native.sum_choices(rows, position, None, None), x)
    assert torch.equal(native.sum_choices(rows, position, None, weights), x * weights)
    wanted = {"needs_rows": True, "needs_weights": True}
    grad_rows, grad_weights = native.sum_choices_backward(grad, rows, row, position, None, weights, **wanted)
    assert grad_rows is not None and torch.equal(grad_rows, (weights * grad)[row])
    torch.testing.assert_close(grad_weights, (x * grad).sum(1, keepdim=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("few", "width"), [(1, 1), (5, 37), (8, 256), (0, 16)])
def test_a_product_joins_what_is_there(few: int, width: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for tokens in (0, 7, 2200):  # the last is streamed at width 256
        x, factors, weight = torch.randn(tokens, width), torch.randn(tokens, few), torch.randn(few, width)
        want = x.double() + factors.double() @ weight.double()
        torch.testing.assert_close(native.add_product(x, factors, weight).double(), want, rtol=1e-5, atol=1e-5)
    apart = weight.t().contiguous().t()
    assert torch.equal(native.add_product(x, factors, apart), native.add_product(x, factors, weight))
    with pytest.raises(ValueError, match="make no"):
        native.add_product(x, factors, weight[:, :-1])


def test_all_kept_may_be_said_by_nothing() -> None:
    row, position, kept = layout(2, TOKENS, False)
    assert kept.all()
    rows, weights, grad = torch.randn(len(row), 8), torch.rand(TOKENS, 2), torch.randn(TOKENS, 8)
    for some in (kept, None):
        y = native.sum_choices(rows, position, some, weights)
        grads = native.sum_choices_backward(
            grad, rows, row, position, some, weights, needs_rows=True, needs_weights=True
        )
        if some is not None:
            first = (y, *grads)
    assert all(torch.equal(a, b) for a, b in zip(first, (y, *grads), strict=True))


def test_strides_do_not_matter() -> None:
    row, position, kept = layout(2, 4, True)
    x = torch.randn(TOKENS, 6)
    apart = torch.randn(6, TOKENS).t().copy_(x)
    assert torch.equal(native.take_rows(apart, row, 2), native.take_rows(x, row, 2))
    rows, weights = torch.randn(len(row), 6), torch.rand(TOKENS, 2)
    found = [
        native.sum_choices(rows, p, k, w)
        for p, k, w in ((position, kept, weights), (*(t.t().contiguous().t() for t in (position, kept, weights)),))
    ]
    assert torch.equal(*found)
    slope = torch.ones(1, 1).expand(TOKENS, 6)  # what the gradient of a sum looks like
    wanted = {"needs_rows": True, "needs_weights": True}
    mine, other = (
        native.sum_choices_backward(g, rows, row, position, kept, weights, **wanted) for g in (slope, slope.clone())
    )
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_no_token_at_all() -> None:
    none = torch.zeros(0, 2, dtype=torch.int64)
    slot, length = native.line_up(none, None, 3)
    assert slot.shape == (0, 2) and length.tolist() == [0, 0, 0]
    row, position = native.give_rows(none, slot, None, torch.tensor([0, 2, 4]), 6)
    assert row.tolist() == [-1] * 6 and position.shape == (0, 2)
    assert native.take_rows(torch.randn(0, 4), row, 2).tolist() == [[0.0] * 4] * 6
    assert native.sum_choices(torch.randn(6, 4), position, None, torch.rand(0, 2)).shape == (0, 4)


INDICES = torch.tensor([[0], [1]])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: native.line_up(INDICES, None, 1), r"expert's number is not in \[0, 1\)"),
        (lambda: native.line_up(-INDICES, None, 2), r"expert's number is not in \[0, 2\)"),
        (lambda: native.line_up(INDICES, torch.tensor([0, 2]), 2), r"a turn not in \[0, 2\)"),
        (lambda: native.line_up(INDICES, torch.tensor([0]), 2), r"turn of shape \(1,\) must be \(2,\)"),
        (lambda: native.line_up(INDICES.int(), None, 2), "expert_ids is torch.int32.*int64 on a CPU alone"),
        (lambda: native.line_up(INDICES[:, 0], None, 2), "must have two axes"),
        (lambda: native.give_rows(INDICES, INDICES, None, torch.tensor([0, 1]), 2), r"row is not in \[0, 2\)"),
        (lambda: native.give_rows(INDICES, INDICES, INDICES, torch.tensor([0, 1]), 2), "kept is torch.int64.*bool"),
        (lambda: native.take_rows(torch.ones(2, 3), torch.tensor([2]), 1), "a row's choice is not below 2"),
        (lambda: native.take_rows(torch.ones(2, 3).double(), torch.tensor([1]), 1), "x is torch.float64"),
        (lambda: native.take_rows(torch.ones(2, 3), torch.tensor([1]), 0), "0 choices"),
        (lambda: native.sum_choices(torch.ones(1, 3), INDICES, None, None), r"row is not in \[0, 1\)"),
        (lambda: native.sum_choices(torch.ones(2, 3), -INDICES, None, None), r"row is not in \[0, 2\)"),
        (lambda: native.sum_choices(torch.ones(2, 3), INDICES, None, torch.ones(2)), r"weights of shape \(2,\)"),
        (lambda: backward(grad=torch.ones(2, 4)), r"grad of shape \(2, 4\) must be \(2, 3\)"),
        (lambda: backward(position=INDICES + 1), r"row is not in \[0, 2\)"),
        (lambda: backward(row=torch.tensor([0])), r"row of shape \(1,\) must be \(2,\)"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def backward(**changed: Tensor) -> object:
    given: dict[str, Any] = {
        "grad": torch.ones(2, 3),
        "rows": torch.ones(2, 3),
        "row": torch.tensor([0, 1]),
        "position": INDICES,
        "kept": None,
        "weights": torch.ones(2, 1),
        "needs_rows": True,
        "needs_weights": True,
    }
    return native.sum_choices_backward(**(given | changed))
