"""Window geometry by hand."""

from __future__ import annotations

import pytest
import torch

from swinmoe.models.windows import attention_mask, fit_window, window_grid


@pytest.mark.parametrize(
    ("size", "window", "small_map", "expected"),
    [
        ((56, 56), (7, 7), "shrink", (7, 7)),
        ((6, 6), (12, 12), "shrink", (6, 6)),
        ((6, 20), (12, 12), "shrink", (6, 6)),  # square windows stay square: the shorter side rules both axes
        ((6, 20), (12, 10), "shrink", (6, 10)),  # rectangular ones shrink axis by axis
        ((6, 20), (12, 12), "pad", (12, 12)),
    ],
)
def test_a_map_below_the_window(size, window, small_map, expected) -> None:
    assert fit_window(size, window, square=window[0] == window[1], small_map=small_map) == expected


@pytest.mark.parametrize(
    ("size", "window", "small_map", "shift"),
    [
        ((56, 56), (7, 7), "shrink", (3, 3)),
        ((7, 7), (7, 7), "shrink", (0, 0)),  # one window
        ((7, 21), (7, 7), "shrink", (0, 0)),  # Microsoft: neither axis, once the shorter side fits into a window
        ((7, 21), (7, 5), "shrink", (0, 2)),
        ((7, 21), (7, 7), "pad", (0, 3)),
        ((5, 5), (7, 7), "pad", (0, 0)),
        ((3, 3), (1, 1), "shrink", (0, 0)),
    ],
)
def test_an_axis_is_shifted_where_it_helps(size, window, small_map, shift) -> None:
    grid = window_grid(size, window, shifted=True, square=window[0] == window[1], small_map=small_map)
    assert grid.shift == shift
    unshifted = window_grid(size, window, shifted=False, square=window[0] == window[1], small_map=small_map)
    assert unshifted.shift == (0, 0)


def test_padding_and_counts() -> None:
    grid = window_grid((17, 20), (4, 4), shifted=True, square=True, small_map="shrink")
    assert (grid.padding, grid.padded, grid.counts, grid.num_windows, grid.area) == ((3, 0), (20, 20), (5, 5), 25, 16)


def test_no_mask_where_nothing_is_forbidden() -> None:
    whole = window_grid((8, 8), (4, 4), shifted=False, square=True, small_map="shrink")
    assert attention_mask(whole, "mask") is None
    padded = window_grid((7, 8), (4, 4), shifted=False, square=True, small_map="shrink")
    assert attention_mask(padded, "attend") is None
    assert attention_mask(padded, "mask") is not None


def test_a_row_of_six_by_hand() -> None:
    """One row of 5 tokens in windows of 2, padded to 6 and shifted by 1: windows hold tokens 1 2 | 3 4 | P 0."""
    grid = window_grid((1, 5), (1, 2), shifted=True, square=False, small_map="shrink")
    assert grid.shift == (0, 1)
    together, apart = torch.ones(2, 2, dtype=torch.bool), torch.eye(2, dtype=torch.bool)
    for policy in ("mask", "attend"):  # the last window joins padding and the far edge: apart either way
        mask = attention_mask(grid, policy)
        assert mask is not None
        assert torch.equal(mask, torch.stack((together, together, apart)))


def test_every_token_may_attend_to_itself() -> None:
    """So no row of a softmax is empty, not even in windows that hold padding alone."""
    for size in ((9, 13), (17, 17), (5, 30)):
        for shifted in (False, True):
            grid = window_grid(size, (8, 8), shifted=shifted, square=True, small_map="pad")
            mask = attention_mask(grid, "mask")
            assert mask is not None
            assert bool(mask.diagonal(dim1=1, dim2=2).all())
