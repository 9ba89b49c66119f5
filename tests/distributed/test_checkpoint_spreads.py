"""A checkpoint has no world size: saved under any spread of experts, it is all there under any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import spreads
from pool import Pool
from spreads import (
    CUT_AND_ZERO,
    CUT_TWO,
    DATA,
    FOUR,
    ONE,
    REPLICAS,
    SLICED,
    TWO,
    ZERO_FOUR,
    ZERO_REPLICAS,
    ZERO_TWO,
)

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("experts", "those"),
    [
        (2, [ONE, TWO, REPLICAS, SLICED]),
        (4, [ONE, DATA, TWO, FOUR, REPLICAS]),
        (4, [ONE, REPLICAS, ZERO_TWO, ZERO_FOUR, ZERO_REPLICAS]),
        (4, [ONE, ZERO_REPLICAS, CUT_TWO, CUT_AND_ZERO]),
        (1, [ONE, ZERO_REPLICAS, CUT_AND_ZERO]),
    ],
    ids=["2 experts, sliced too", "4 experts", "ZeRO", "FSDP2", "1 expert, in slices whose moments are dealt out"],
)
def test_saved_anywhere_loaded_anywhere(
    tmp_path: Path, pool2: Pool, pool4: Pool, experts: int, those: list[spreads.Spread]
) -> None:
    """Model, average and AdamW's moments bit by bit, and the same losses afterwards."""
    found = spreads.cells(tmp_path, those, experts, spreads.runner({2: pool2, 4: pool4}))
    assert len(found) == len(those) ** 2
    table = "\n".join(spreads.rows(found))
    assert all(cell.bit_equal for cell in found), table
    assert max(cell.furthest for cell in found) < 1e-9, table


def test_ranks_share_the_writing(tmp_path: Path, pool4: Pool) -> None:
    """Four ranks write four files of about the same size, of dense tensors too."""
    spreads.runner({4: pool4})(FOUR)(spreads.save_at, tmp_path, FOUR, 4)
    sizes = [path.stat().st_size for path in (tmp_path / "step-00000003").glob("*-of-00004.safetensors")]
    assert len(sizes) == 12  # model, average, optimizer
    by_rank = [
        sum(path.stat().st_size for path in (tmp_path / "step-00000003").glob(f"*-0000{rank}-of-00004.safetensors"))
        for rank in (1, 2, 3, 4)
    ]
    assert max(by_rank) < 1.2 * min(by_rank)
