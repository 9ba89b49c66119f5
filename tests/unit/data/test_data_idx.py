from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from swinmoe.data.idx import read_idx
from swinmoe.errors import DataError

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
GOOD = b"\0\0\x08\x03" + struct.pack(">III", 2, 3, 4) + bytes(range(24))


@pytest.mark.parametrize("name", ["plain", "packed.gz"])
def test_reads_plain_and_gzipped(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(GOOD) if name.endswith(".gz") else GOOD)
    assert np.array_equal(read_idx(path, axes=3), ARRAY)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (GOOD[:-1], r"declares shape \(2, 3, 4\), 40 bytes in all, but holds 39"),
        (GOOD + b"x", "but holds 41"),
        (GOOD[:10], "10 bytes, less than an idx header"),
        (b"", "0 bytes"),
        (b"\0\0\x0d\x03" + GOOD[4:], "starts with bytes 00 00 0d 03"),
        (b"\0\0\x08\x01" + GOOD[4:], "starts with bytes 00 00 08 01"),
        (b"\x89PNG" + GOOD[4:], "starts with bytes 89 50 4e 47"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_idx(path, axes=3)


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    packed = gzip.compress(GOOD)
    flipped = packed[:15] + bytes([packed[15] ^ 0xFF]) + packed[16:]
    for content in (packed[:-9], b"not gzip at all", flipped):
        path = tmp_path / "file.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"file\.gz .*fetch the data set again"):
            read_idx(path, axes=3)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        read_idx(tmp_path / "absent", axes=1)
