"""Changes of order against lists that are cut and put together again; each direction is the other's transpose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swinmoe.comm import departure_order, fold, regroup, take


@st.composite
def changes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=6))
    copies = draw(st.integers(1, 3))
    return lengths, draw(st.permutations(list(range(len(lengths))) * copies))


@given(changes())
def test_blocks_are_taken_in_order_and_folded_back(change: tuple[list[int], list[int]]) -> None:
    lengths, order = change
    copies = len(order) // len(lengths)
    rows = torch.randn(sum(lengths), 3, dtype=torch.float64)
    regrouping = regroup(torch.tensor(lengths), torch.tensor(order))
    blocks = rows.split(lengths)
    taken = take(rows, regrouping)
    assert torch.equal(taken, torch.cat([blocks[i] for i in order]))
    assert torch.allclose(fold(taken, regrouping), copies * rows)
    if regrouping is None:
        assert order == list(range(len(lengths)))
        return
    if copies == 1:
        assert torch.equal(take(taken, regrouping.inverse()), rows)
    # <take(a), b> = <a, fold(b)>, which is what makes each the other's gradient.
    other = torch.randn_like(taken)
    assert torch.allclose((taken * other).sum(), (rows * fold(other, regrouping)).sum())


def test_gradients_are_exact() -> None:
    change = regroup(torch.tensor([2, 0, 3]), torch.tensor([2, 0, 1, 0, 2, 1]))
    rows = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: take(x, change), rows)
    copied = torch.randn(10, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: fold(x, change), copied)


def test_whether_rows_move_depends_on_the_order_and_not_on_the_counts() -> None:
    assert regroup(torch.tensor([3, 1]), torch.tensor([0, 1])) is None
    # Nothing would move, but another rank's counts may differ, and graphs must not.
    assert regroup(torch.tensor([0, 0]), torch.tensor([1, 0])) is not None


@pytest.mark.parametrize(
    ("local_size", "order"), [(None, [0, 1, 2, 3, 4, 5]), (3, [0, 3, 1, 4, 2, 5]), (2, [0, 2, 4, 1, 3, 5])]
)
def test_two_stages_sort_by_local_rank_first(local_size: int | None, order: list[int]) -> None:
    assert departure_order(6, local_size).tolist() == order
