"""Safetensors files, read and written tensor by tensor: into memory that exists, at known places, hashed on the way.

The safetensors library checks the format of whatever is read; the bytes then go straight between file and tensor. It
maps files into memory, where every page that was looked at counts as this process's, and it wants all tensors of a file
before the first byte is written. Neither fits into a budget of 1.2 times what a rank holds
(`docs/decisions/0006-a-store-of-our-own.md`).

Shapes: a band is a contiguous range along one axis of a tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swinmoe.errors import CheckpointError, DamagedError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_CHUNK_BYTES = 4 * 2**20
"""Read and hashed at once: small enough to be hashed from the processor's cache."""


class Band(NamedTuple):
    """Rows [start, start + length) along `axis`."""

    axis: int
    start: int
    length: int


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file, and what it is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte of the file at which it begins."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def runs(self, band: Band | None) -> Iterator[tuple[int, int]]:
        """(byte of the file, bytes) of each contiguous piece of `band`, in the order of its elements."""
        if band is None:
            yield self.start, self.nbytes
            return
        inner = math.prod(self.shape[band.axis + 1 :]) * self.dtype.itemsize
        for outer in range(math.prod(self.shape[: band.axis])):
            yield self.start + (outer * self.shape[band.axis] + band.start) * inner, band.length * inner


@dataclass(frozen=True)
class Digests:
    """SHA-256 of a file's header and of each tensor: together they cover every byte of it."""

    header: str
    tensors: Mapping[str, str]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    assert tensor.device.type == "cpu" and tensor.is_contiguous()
    view: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return view


def sha256(data: memoryview | bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(data).hexdigest()


# --------------------------------------------------------------------------------------------------------- reading


class TensorFile:
    """One safetensors file, open for reading. Counts the bytes that it reads.

    Args:
        path: the file.
        digests: what header and tensors must hash to; None = unknown, as in files of other programs.

    Raises:
        DamagedError: it is missing, no safetensors file, or its header is not the one that was written.
    """

    def __init__(self, path: Path, digests: Digests | None = None) -> None:
        self.path = path
        self.digests = digests
        self.bytes_read = 0
        self.entries, header = _read_header(path)
        self.bytes_read += len(header)
        if digests is not None:
            if sha256(header) != digests.header:
                raise DamagedError(f"{damaged(path)}: its header is not the one that the manifest names")
            if self.entries.keys() != digests.tensors.keys():
                raise DamagedError(f"{damaged(path)}: it holds other tensors than the manifest names")
        self._handle = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)

    def read(self, name: str, out: Tensor, band: Band | None = None) -> None:
        """Fill `out`, a contiguous CPU tensor of the right type, with a tensor or a band of it.

        Raises:
            DamagedError: the file ends too early or cannot be read; names file and tensor.
        """
        entry, memory, filled = self.entries[name], bytes_of(out), 0
        for start, count in entry.runs(band):
            self._fill(memory[filled : filled + count], start, name)
            filled += count
        assert filled == len(memory), (name, filled, len(memory))

    def check(self, name: str, data: memoryview) -> None:
        """Hold `data`, all of a tensor, against its digest, where that is known."""
        if self.digests is not None and sha256(data) != self.digests.tensors[name]:
            raise DamagedError(f"{damaged(self.path)}: tensor {name!r} is not what was written (its hash differs)")

    def verify(self, name: str) -> None:
        """Read a tensor through a small buffer and hold it against its digest, where that is known."""
        if self.digests is None:
            return
        entry, digest = self.entries[name], hashlib.sha256()
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, entry.nbytes)))
        for start in range(0, entry.nbytes, _CHUNK_BYTES):
            chunk = buffer[: min(_CHUNK_BYTES, entry.nbytes - start)]
            self._fill(chunk, entry.start + start, name)
            digest.update(chunk)
        if digest.hexdigest() != self.digests.tensors[name]:
            raise DamagedError(f"{damaged(self.path)}: tensor {name!r} is not what was written (its hash differs)")

    def _fill(self, memory: memoryview, start: int, name: str) -> None:
        done = 0
        while done < len(memory):
            try:
                count = os.preadv(self._handle, [memory[done:]], start + done)
            except OSError as error:
                raise DamagedError(f"{damaged(self.path)}: tensor {name!r} cannot be read ({error})") from error
            if count == 0:
                raise DamagedError(f"{damaged(self.path)}: it ends within tensor {name!r}")
            done += count
        self.bytes_read += done


def damaged(path: Path) -> str:
    """How every message about a damaged file begins."""
    return f"checkpoint file {str(path)!r} is damaged"


def _read_header(path: Path) -> tuple[dict[str, Entry], bytes]:
    """Where every tensor lies, and the bytes that say so, after the library has found them sound."""
    try:
        with safe_open(path, framework="pt"):  # refuses gaps, overlaps, lengths and types that do not fit
            pass
        with path.open("rb") as file:
            length = file.read(8)
            header = length + file.read(int.from_bytes(length, "little"))
        listed = json.loads(header[8:])
    except FileNotFoundError as error:
        raise DamagedError(f"checkpoint file {str(path)!r} is missing") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedError(
            f"{damaged(path)}, or is not in the safetensors format ({error}){_what_else(path)}"
        ) from error
    entries = {}
    for name, given in listed.items():
        if name == "__metadata__":
            continue
        if given["dtype"] not in DTYPES:
            raise CheckpointError(f"{str(path)!r}: tensor {name!r} is of type {given['dtype']}, which torch has not")
        start = len(header) + given["data_offsets"][0]
        entries[name] = Entry(DTYPES[given["dtype"]], tuple(given["shape"]), start)
    return entries, header


def _what_else(path: Path) -> str:
    """What a file that claims to be safetensors looks like, where that is known."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError:
        return ""
    if magic[:2] == b"PK" or magic[:1] == b"\x80":
        return "; it looks like a pickle, which can run code when loaded: it was not opened as one"
    return ""


# --------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Shape:
    """Type and size of a tensor yet to be written."""

    dtype: torch.dtype
    size: tuple[int, ...]


class TensorWriter:
    """A safetensors file in the making, whose tensors come in any order, one at a time.

    Args:
        path: the file; it must not exist.
        shapes: what will be written, by name.

    Raises:
        OSError: the disk is full or not writable; names the file, and the tensor that it happened in.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Shape]) -> None:
        self.path = path
        header, self._starts, self._size = _layout(shapes)
        self._missing = set(shapes)
        self._header = sha256(header)
        self._digests: dict[str, str] = {}
        self._hashing: tuple[str, Future[str]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            self._put(memoryview(header), 0, "its header")
        except OSError:
            self.abandon()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its place. At most this one and the one before are held."""
        data = bytes_of(tensor.detach().cpu().contiguous())
        self._settle()
        self._hashing = (name, self._pool.submit(sha256, data))  # beside the writing: both leave Python alone
        self._put(data, self._starts[name], f"tensor {name!r}")
        self._missing.discard(name)

    def close(self) -> tuple[int, Digests]:
        """Bring the file to the disk; its size and digests."""
        assert not self._missing, f"{self.path} lacks {sorted(self._missing)[:5]}"
        self._settle()
        with named(self.path, "bringing it to the disk"):
            os.fsync(self._handle)
        self.abandon()
        return self._size, Digests(self._header, dict(self._digests))

    def abandon(self) -> None:
        """Let go of the file, as it is."""
        self._pool.shutdown()
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def _settle(self) -> None:
        if self._hashing is not None:
            name, digest = self._hashing
            self._digests[name] = digest.result()
            self._hashing = None

    def _put(self, data: memoryview, start: int, what: str) -> None:
        done = 0
        with named(self.path, f"writing {what}"):
            while done < len(data):
                done += os.pwrite(self._handle, data[done:], start + done)


@contextmanager
def named(path: Path, doing: str) -> Iterator[None]:
    """An `OSError` from within says which file it was, and what was being done to it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}, {doing}", str(path)) from error


def _layout(shapes: Mapping[str, Shape]) -> tuple[bytes, dict[str, int], int]:
    """Header, the byte at which each tensor starts, and the size of the file. Wide types first: all are aligned."""
    order: Sequence[str] = sorted(shapes, key=lambda name: -shapes[name].dtype.itemsize)
    listed: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in order:
        shape = shapes[name]
        start, end = end, end + math.prod(shape.size) * shape.dtype.itemsize
        offsets[name] = start
        listed[name] = {"dtype": _CODES[shape.dtype], "shape": list(shape.size), "data_offsets": [start, end]}
    text = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in offsets.items()}, len(header) + end
