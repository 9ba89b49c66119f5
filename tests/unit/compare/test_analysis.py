"""The class × expert table against one counted by hand."""

from __future__ import annotations

import torch

from swinmoe.compare.analysis import class_expert_table


def test_table_by_hand() -> None:
    # Two images of two tokens each; classes 2 and 0; experts 0..2; one token of the first image was dropped.
    expert_ids = torch.tensor([[1, 0], [-1, 2], [2, 1], [2, 0]])
    table = class_expert_table(expert_ids, torch.tensor([2, 0]), classes=3, experts=3)
    assert table.tolist() == [[0, 0, 2], [0, 0, 0], [0, 1, 0]]


def test_no_images_give_zeros() -> None:
    table = class_expert_table(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 2, 3)
    assert table.shape == (2, 3) and table.sum() == 0
