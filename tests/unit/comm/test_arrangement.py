"""Rows by source put by expert: pieces and indices say the same, against a sort."""

import pytest
import torch
from torch import Tensor

from swinmoe.comm import fold, take
from swinmoe.comm.arrangement import Arrangement, by_expert

SEGMENTS = torch.tensor([[2, 0, 3], [0, 1, 1], [4, 0, 0], [1, 2, 0]])


def travelling(segments: Tensor) -> tuple[Tensor, Tensor]:
    """(expert, number) of each row, by source; and the same sorted by expert."""
    owner = torch.cat([torch.arange(segments.shape[1]).repeat_interleave(source) for source in segments])
    rows = torch.stack([owner, torch.arange(len(owner))], dim=1)
    return rows, rows[owner.argsort(stable=True)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_pieces_put_rows_where_a_sort_does(ranks: int) -> None:
    rows, wanted = travelling(SEGMENTS)
    found = by_expert(SEGMENTS, ranks)
    assert isinstance(found, Arrangement) and len(found.pieces) == ranks
    out, at = torch.full_like(rows, -1), 0
    for rank, pieces in enumerate(found.pieces):
        assert sum(count for _, count in pieces) == SEGMENTS.view(ranks, -1)[rank].sum()
        for start, count in pieces:
            assert count > 0
            out[start : start + count] = rows[at : at + count]
            at += count
    assert torch.equal(out, wanted)


def test_the_index_does_too_and_leads_back() -> None:
    rows, wanted = travelling(SEGMENTS)
    found = by_expert(SEGMENTS, 2)
    assert found is not None
    change = found.change(torch.device("cpu"))
    assert torch.equal(take(rows, change), wanted) and torch.equal(fold(wanted, change), rows)
    assert found.change(torch.device("cpu")) is change  # made once


def test_one_source_or_one_expert_stands_by_expert_already() -> None:
    assert by_expert(SEGMENTS[:1], 1) is None
    assert by_expert(SEGMENTS[:, :1], 4) is None


def test_no_rows_at_all() -> None:
    found = by_expert(torch.zeros(2, 3, dtype=torch.int64), 2)
    assert found is not None and found.pieces == ((), ())
    assert take(torch.zeros(0, 2), found.change(torch.device("cpu"))).shape == (0, 2)
