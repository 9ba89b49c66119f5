"""What a zip archive holds, read entry by entry, so that millions of members cost no memory by themselves.

Python's `zipfile` makes an object of about a kilobyte for each member before the first can be read. The layout is that
of PKWARE's APPNOTE.TXT 6.3 (end record 4.3.16, ZIP64 4.3.14 and 4.5.3, central directory 4.3.12, local header 4.3.7).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from swinmoe.data.archive import ArchiveFiles
from swinmoe.errors import DataError

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_LONGEST_COMMENT = 0xFFFF
_IN_EXTRA = 0xFFFFFFFF  # the value is in the entry's ZIP64 field
_ENCRYPTED, _UTF8 = 1 << 0, 1 << 11
_STORED, _DEFLATED = 0, 8


@dataclass(frozen=True)
class Entry:
    """One member."""

    name: str
    offset: int
    """Of its local header."""
    size: int
    """Bytes it takes in the archive."""
    crc: int
    """CRC-32 of its content."""
    method: int
    encrypted: bool


def directory(path: str) -> Iterator[Entry]:
    """The members of a zip archive, in the order of its central directory.

    Raises:
        DataError: not a zip archive, cut off, or damaged.
    """
    try:
        with open(path, "rb") as file:
            yield from _entries(file, path)
    except OSError as error:
        raise DataError(f"zip archive {path} cannot be read ({error.strerror or error})") from error


def readable(entry: Entry, path: str) -> Entry:
    """`entry`, if its content can be read: stored or deflated, and not encrypted; else `DataError`."""
    if entry.encrypted:
        raise DataError(f"{path}@/{entry.name} is encrypted; pack the images without a password")
    if entry.method not in (_STORED, _DEFLATED):
        raise DataError(
            f"{path}@/{entry.name} is compressed by method {entry.method}; pack the images stored (best, for pictures "
            "are compressed already) or deflated"
        )
    return entry


def content(files: ArchiveFiles, archive: int, offset: int, size: int, crc: int) -> bytes:
    """The bytes of the member whose local header is at `offset` and which takes `size` bytes.

    Raises:
        DataError: damaged, by its CRC-32 or by what deflate says; the member's name is the caller's to tell.
    """
    header = _local_header(files, archive, offset)
    method, name_size, extra_size = header[3], header[9], header[10]
    packed = files.read(archive, offset + _LOCAL.size + name_size + extra_size, size)
    try:
        data = packed if method == _STORED else zlib.decompress(packed, wbits=-zlib.MAX_WBITS)
    except zlib.error as error:
        raise DataError(f"it does not decompress: {error}") from error
    if zlib.crc32(data) != crc:
        raise DataError(f"its CRC-32 is {zlib.crc32(data):08x}, the archive's directory says {crc:08x}")
    return data


def local_name(files: ArchiveFiles, archive: int, offset: int) -> str:
    """The name in the local header at `offset`; `DataError` if there is none."""
    header = _local_header(files, archive, offset)
    return _text(files.read(archive, offset + _LOCAL.size, header[9]), header[2])


def _local_header(files: ArchiveFiles, archive: int, offset: int) -> tuple[int, ...]:
    header = _LOCAL.unpack(files.read(archive, offset, _LOCAL.size))
    if header[0] != b"PK\3\4":
        raise DataError(f"no member begins at byte {offset}")
    return header


def _text(name: bytes, flags: int) -> str:
    return name.decode("utf-8" if flags & _UTF8 else "cp437", errors="replace")


def _entries(file: BinaryIO, path: str) -> Iterator[Entry]:
    count, size, start = _end(file, path)
    file.seek(start)
    end = start + size
    for number in range(count):
        at = file.tell()
        fixed = file.read(_ENTRY.size)
        if len(fixed) < _ENTRY.size or at + _ENTRY.size > end or fixed[:4] != b"PK\1\2":
            raise DataError(f"zip archive {path} is damaged: entry {number} of {count} is not where it should be")
        values = _ENTRY.unpack(fixed)
        flags, method, crc, packed, raw = values[3], values[4], values[7], values[8], values[9]
        name = _text(file.read(values[10]), flags)
        extra = file.read(values[11])
        file.read(values[12])  # the comment; reading stays inside the buffer, seeking would empty it
        packed, offset = _wide(extra, raw, packed, values[16], f"{path}@/{name}")
        if offset + _LOCAL.size + packed > start:
            raise DataError(f"{path}@/{name} lies outside the archive: the zip archive is damaged; fetch it again")
        yield Entry(name, offset, packed, crc, method, bool(flags & _ENCRYPTED))
    if file.tell() != end:
        raise DataError(f"zip archive {path} is damaged: its directory does not end with entry {count}")


def _end(file: BinaryIO, path: str) -> tuple[int, int, int]:
    """Number of entries, size and start of the central directory."""
    length = file.seek(0, os.SEEK_END)
    tail_start = max(0, length - _END.size - _LONGEST_COMMENT)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise DataError(f"{path} is no zip archive, or was cut off: it has no end record; fetch it again")
    _, _, _, _, count, size, start, _ = _END.unpack_from(tail, at)
    where = tail_start + at
    if count == 0xFFFF or _IN_EXTRA in (size, start):
        count, size, start, where = _end64(file, path, where, (count, size, start))
    if start + size > where:
        raise DataError(f"zip archive {path} is damaged: its directory lies outside of it; fetch it again")
    return count, size, start


def _end64(file: BinaryIO, path: str, where: int, narrow: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The end record's values with 64 bits, where the archive has such a record, and where the directory must end."""
    file.seek(max(0, where - _LOCATOR.size))
    locator = file.read(_LOCATOR.size)
    if where < _LOCATOR.size or locator[:4] != b"PK\6\7":
        return *narrow, where  # exactly 65535 members need none
    at = _LOCATOR.unpack(locator)[2]
    file.seek(at)
    record = file.read(_END64.size)
    if len(record) < _END64.size or record[:4] != b"PK\6\6":
        raise DataError(f"zip archive {path} is damaged: its ZIP64 end record is not at byte {at}; fetch it again")
    values = _END64.unpack(record)
    return values[7], values[8], values[9], at


def _wide(extra: bytes, raw: int, packed: int, offset: int, name: str) -> tuple[int, int]:
    """Packed size and offset, from the ZIP64 field where 32 bits do not hold them."""
    if _IN_EXTRA not in (raw, packed, offset):
        return packed, offset
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + size]
            wide = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            try:  # the field holds those values only that did not fit, in this order
                _, packed, offset = (next(wide) if value == _IN_EXTRA else value for value in (raw, packed, offset))
            except (StopIteration, RuntimeError, ValueError) as error:
                raise DataError(f"{name} has a damaged ZIP64 field; fetch the archive again") from error
            return packed, offset
        at += 4 + size
    raise DataError(f"{name} lacks its ZIP64 field: the zip archive is damaged; fetch it again")
