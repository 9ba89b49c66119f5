"""The list of a folder's files with sizes and hashes, by which everything read from it is checked.

`manifest.json` is written last. It carries a hash of itself and has one way to be written, so that no byte of it can
change unnoticed either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swinmoe.checkpoint.tensor_file import Digests, damaged, sha256
from swinmoe.errors import CheckpointError, DamagedError

MANIFEST = "manifest.json"
FORMAT = 2


@dataclass(frozen=True)
class FileRecord:
    """What one file was when it was written."""

    size: int
    sha256: str | None = None
    """Of all of it; None where `tensors` has one of each part."""
    tensors: Digests | None = None


@dataclass(frozen=True)
class Manifest:
    """A folder's files by their paths in it."""

    files: Mapping[str, FileRecord]
    step: int | None = None
    """Optimiser steps; None for a model alone."""
    score: float | None = None
    """Accuracy of an evaluation at that step, the higher the better; None = there was none."""

    def dumps(self) -> str:
        """The text of `manifest.json`."""
        files: dict[str, Any] = {}
        for name, record in sorted(self.files.items()):
            if record.tensors is None:
                files[name] = {"size": record.size, "sha256": record.sha256}
            else:
                digests = record.tensors
                files[name] = {"size": record.size, "sha256_of_header": digests.header, "sha256": dict(digests.tensors)}
        body = {"format": FORMAT, "step": self.step, "score": self.score, "files": files}
        return _text(body | {"sha256_of_this": sha256(_text(body).encode())})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`.

    Raises:
        DamagedError: there is none, or it is not as it was written.
        CheckpointError: it is of another format.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode()
        tree = json.loads(text)
    except FileNotFoundError as error:
        raise DamagedError(f"{str(folder)!r} is not a complete checkpoint: it has no {MANIFEST}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{damaged(path)}: {error}") from error
    if not isinstance(tree, dict) or "format" not in tree:
        raise DamagedError(f"{damaged(path)}: it is no manifest")
    claimed = tree.pop("sha256_of_this", None)
    if claimed is None and tree["format"] == 1:
        raise CheckpointError(
            f"{str(folder)!r} is a checkpoint of format 1, of a swinmoe before sharded checkpoints; this version reads "
            f"format {FORMAT}. Train on with the version that wrote it, or start a new run under another name"
        )
    if claimed != sha256(_text(tree).encode()) or _text(tree | {"sha256_of_this": claimed}) != text:
        raise DamagedError(f"{damaged(path)}: it is not as it was written (its own hash differs)")
    if tree["format"] != FORMAT:
        raise CheckpointError(f"{str(path)!r} is of format {tree['format']}; this version reads format {FORMAT}")
    return Manifest({name: _record(given) for name, given in tree["files"].items()}, tree["step"], tree["score"])


def check_file(folder: Path, name: str, record: FileRecord) -> None:
    """Hold a file that is no tensor file against its record, whole.

    Raises:
        DamagedError: it is missing or another; names it.
    """
    path = folder / name
    check_size(folder, name, record)
    if record.sha256 is not None and hash_file(path) != record.sha256:
        raise DamagedError(f"{damaged(path)}: its hash is not the manifest's")


def check_size(folder: Path, name: str, record: FileRecord) -> None:
    """Hold a file's size against its record."""
    path = folder / name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DamagedError(f"checkpoint {str(folder)!r} lacks the file {name!r} that its manifest names") from error
    if size != record.size:
        raise DamagedError(f"{damaged(path)}: it has {size} bytes, and the manifest names {record.size}")


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedError(f"{damaged(path)}: it cannot be read ({error})") from error


def _record(given: Mapping[str, Any]) -> FileRecord:
    if "sha256_of_header" in given:
        return FileRecord(given["size"], tensors=Digests(given["sha256_of_header"], given["sha256"]))
    return FileRecord(given["size"], given["sha256"])


def _text(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
