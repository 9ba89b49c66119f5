"""A checkpoint is a folder `step-00001234/`: safetensors files, `state.json`, and a manifest with sizes and hashes.

It is written under a temporary name, synced, and renamed, so that a folder with the final name is complete, or damaged
from outside; the manifest tells which. Tensors carry global names and whole shapes, so nothing in it depends on how
many processes wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from swinmoe.errors import CheckpointError

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint read back: `tensors` by file stem (`model`, `optimizer` ...) and the JSON `state`."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep_last: int
) -> Path:
    """Write `folder/step-XXXXXXXX` atomically and remove all but the newest `keep_last`; returns its path.

    `tensors` maps a file stem (sub-folders allowed) to named tensors. Call it on one process only.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    aside = folder / f".writing-step-{step:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        for stem, group in tensors.items():
            file = aside / f"{stem}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({k: v.detach().contiguous().cpu() for k, v in group.items()}, file)
        (aside / STATE).write_text(json.dumps({**state, "step": step}, indent=1))
        files = {str(p.relative_to(aside)): _fingerprint(p) for p in sorted(aside.rglob("*")) if p.is_file()}
        (aside / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1))
        for path in [*aside.rglob("*"), aside]:
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"could not write checkpoint {str(final)!r}: {error}; earlier checkpoints are intact; free space or choose "
            "another output_dir"
        ) from error
    others = [path for path in _complete(folder) if path != final]
    for old in others[: max(0, len(others) - (keep_last - 1))]:
        shutil.rmtree(old)
    return final


def drop_newer(folder: Path, step: int) -> None:
    """Remove checkpoints beyond `step`, when a run goes on from an earlier one: they belong to a branch given up."""
    for path in _complete(folder):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None. Unfinished and truncated ones are passed over."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint whole, checking every file's hash.

    Raises:
        CheckpointError: names the file that is missing or damaged.
    """
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT or "files" not in manifest:
        raise CheckpointError(f"{str(path / MANIFEST)!r} is not a manifest of format {FORMAT}; it is damaged, or newer")
    for name, (size, digest) in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {str(path)!r} lacks the file {name!r} that its manifest names")
        if [size, digest] != _fingerprint(file):
            raise CheckpointError(f"checkpoint file {str(file)!r} is damaged: its size or hash is not the manifest's")
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            try:
                tensors[name.removesuffix(".safetensors")] = load_file(path / name)
            except SafetensorError as error:
                raise CheckpointError(f"checkpoint file {str(path / name)!r} is not readable: {error}") from error
    return Checkpoint(path=path, step=manifest["step"], tensors=tensors, state=_read_json(path / STATE))


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and _is_whole(p)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def _is_whole(path: Path) -> bool:
    """Every file of the manifest is there with its size (the hash is checked on loading)."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        return all((path / name).stat().st_size == size for name, (size, _) in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _fingerprint(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{str(path.parent)!r} is not a complete checkpoint: it has no {path.name}") from error
    except ValueError as error:
        raise CheckpointError(f"checkpoint file {str(path)!r} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"checkpoint file {str(path)!r} is damaged: a mapping was expected")
    return value
