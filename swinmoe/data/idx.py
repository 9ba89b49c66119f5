"""Reader of the idx format, in which MNIST and its successors are published.

Two zero bytes, a type code, the number of axes, then each axis as a big-endian uint32, then the values.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from swinmoe.errors import DataError

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, axes: int) -> npt.NDArray[np.uint8]:
    """The unsigned bytes in an idx file (gzipped if its name ends in `.gz`), as an array of `axes` axes.

    Raises:
        DataError: unreadable, not an idx file of bytes, another number of axes, truncated, or longer than declared.
    """
    advice = "delete it and fetch the data set again"
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); {advice}") from error
    header = 4 + 4 * axes
    if len(raw) < header:
        raise DataError(f"{path} has {len(raw)} bytes, less than an idx header of {axes} axes ({header}); {advice}")
    if raw[:2] != b"\0\0" or raw[2] != _UNSIGNED_BYTE or raw[3] != axes:
        raise DataError(
            f"{path} starts with bytes {raw[:4].hex(' ')}; an idx file of unsigned bytes with {axes} axes starts with "
            f"00 00 {_UNSIGNED_BYTE:02x} {axes:02x}; {advice}"
        )
    shape = struct.unpack(f">{axes}I", raw[4:header])
    expected = header + math.prod(shape)
    if len(raw) != expected:
        raise DataError(f"{path} declares shape {shape}, {expected} bytes in all, but holds {len(raw)}; {advice}")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)
