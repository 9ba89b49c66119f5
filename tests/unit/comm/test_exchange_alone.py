"""With a group of one nothing travels, and wrong counts are refused."""

from __future__ import annotations

import pytest
import torch

from swinmoe.comm import all_reduce_sum, all_to_all_rows


def test_alone_rows_and_their_gradient_stay() -> None:
    rows = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    out = all_to_all_rows(rows, [3], [3], None)
    out.sum().backward()
    assert torch.equal(out, rows)
    assert rows.grad is not None and torch.equal(rows.grad, torch.ones_like(rows))


def test_counts_must_add_up_to_the_rows() -> None:
    with pytest.raises(AssertionError, match="3 rows, but the counts say"):
        all_to_all_rows(torch.zeros(3, 2), [2], [2], None)


def test_alone_a_sum_over_ranks_is_the_value() -> None:
    x = torch.ones(2)
    assert all_reduce_sum(x, None) is x
