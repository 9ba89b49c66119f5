"""Relative positions: indices by hand, the range and the transfer of log-spaced offsets, table surgery."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from swinmoe.config import ModelConfig
from swinmoe.models import build_model
from swinmoe.models.position import log_offsets, num_offsets, relative_index, resize_table

F64 = torch.float64


def test_index_of_a_2x2_window_by_hand() -> None:
    """Offsets (dy, dx) from query to key, row-major in a 3x3 table whose centre is 4."""
    expected = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert relative_index((2, 2), (2, 2)).view(4, 4).tolist() == expected


def test_a_smaller_window_reads_the_centre_of_a_larger_table() -> None:
    table = torch.arange(num_offsets((4, 6)))
    small = resize_table(table[:, None], (4, 6), (2, 3))[:, 0]
    assert torch.equal(table[relative_index((2, 3), (4, 6))], small[relative_index((2, 3), (2, 3))])


def test_range_of_log_spaced_offsets() -> None:
    """At its own window the range is ±log2(9)/3; from 8 to 16 it grows by a third, where linear offsets double."""
    own = log_offsets((8, 8), (8, 8), F64)
    assert own.shape == (225, 2)
    assert own.abs().max().item() == pytest.approx(math.log2(9) / 3, abs=1e-15)
    wider = log_offsets((16, 16), (8, 8), F64)
    assert (wider.max() / own.max()).item() == pytest.approx(math.log2(1 + 8 * 15 / 7) / math.log2(9), abs=1e-12)


def test_a_window_of_one_is_finite() -> None:
    assert torch.equal(log_offsets((1, 1), (1, 1), F64), torch.zeros(1, 2, dtype=F64))
    assert log_offsets((1, 3), (1, 3), F64).isfinite().all()


def test_equal_offsets_get_equal_biases_at_a_larger_window() -> None:
    """The promise of log-CPB: pinned to the pre-training window, the bias is a function of the offset alone."""

    def biases(window: int, pretrained: int | None) -> torch.Tensor:
        cfg = ModelConfig(
            style="v2",
            img_size=(64, 64),
            window_size=(window, window),
            embed_dim=8,
            depths=(1,),
            num_heads=(2,),
            num_classes=2,
            pretrained_window_sizes=None if pretrained is None else (pretrained,),
        )
        stage = build_model(cfg, dtype=F64).layers[0]
        tables = stage._tables((16, 16))[0]
        bias = stage.blocks[0].attn.offset_bias(tables).index_select(1, tables.index)
        return bias.view(2, window, window, window, window)

    small, large = biases(8, None), biases(16, 8)
    assert torch.equal(small, large[:, :8, :8, :8, :8])
    assert not torch.allclose(small, biases(16, None)[:, :8, :8, :8, :8], atol=1e-6)


def test_tables_are_cut_exactly_and_grown_smoothly() -> None:
    rows, cols = torch.meshgrid(torch.arange(-6.0, 7), torch.arange(-4.0, 5), indexing="ij")
    table = (2 * rows - cols).reshape(-1, 1).double()
    cut = resize_table(table, (7, 5), (3, 2))
    assert torch.equal(cut, (2 * rows - cols)[4:-4, 3:-3].reshape(-1, 1).double())
    grown = resize_table(table, (7, 5), (9, 7)).view(17, 13)
    assert grown[8, 6].item() == pytest.approx(0, abs=1e-12)  # no offset stays no offset
    inner = grown[4:-4, 4:-4]
    assert torch.allclose(inner, inner.flip(0, 1).neg(), atol=1e-12)


def test_replacing_the_pretrained_window_changes_the_config_only() -> None:
    cfg = ModelConfig(style="v2", window_size=(8, 8), embed_dim=8, depths=(1,), num_heads=(1,), num_classes=2)
    other = replace(cfg, pretrained_window_sizes=(4,))
    shapes = [{k: v.shape for k, v in build_model(c, device="meta").state_dict().items()} for c in (cfg, other)]
    assert shapes[0] == shapes[1]
