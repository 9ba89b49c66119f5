"""`swinmoe diff`: in what two checkpoints, or saved models, differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor

from swinmoe.checkpoint.manifest import MANIFEST
from swinmoe.checkpoint.reader import STATE, Stored, Tensors, locate, open_checkpoint, read_model

_SHOWN = 20


def run(a: Path, b: Path) -> int:
    """Print what differs; the exit status: 0 nothing, 1 something.

    Tensors of known, equal hashes are not read. Times, rates of work and provenance do not count.

    Raises:
        CheckpointError: there is no checkpoint at `a` or `b`, or a damaged one.
    """
    console = Console(highlight=False, soft_wrap=True)
    ours, theirs = _groups(a), _groups(b)
    lines = [*_only(ours, theirs, "group"), *_settings(a, b)]
    for group in ours.keys() & theirs.keys():
        lines += [f"{group}: {line}" for line in _compare(ours[group], theirs[group])]
    for line in lines[:_SHOWN]:
        console.print(line, markup=False)
    if len(lines) > _SHOWN:
        console.print(f"and {len(lines) - _SHOWN} more differences")
    if not lines:
        count = sum(len(tensors) for tensors in ours.values())
        console.print(f"the same: {count} tensors, bit by bit")
    return 1 if lines else 0


def _groups(path: Path) -> dict[str, Tensors]:
    stored, arm = _stored(path)
    if stored is None:
        return {"model": read_model(path)}
    return {group.removeprefix(arm): stored.tensors(group) for group in sorted(stored.groups) if group.startswith(arm)}


def _stored(path: Path) -> tuple[Stored | None, str]:
    place, arm = locate(path)
    known = place.is_dir() and (place / MANIFEST).is_file()
    return (open_checkpoint(place) if known else None), arm


def _compare(ours: Tensors, theirs: Tensors) -> Iterator[str]:
    yield from _only(ours, theirs, "tensor")
    for name in ours:
        if name not in theirs:
            continue
        mine, other = ours.entry(name), theirs.entry(name)
        if (mine.shape, mine.dtype) != (other.shape, other.dtype):
            yield f"{name}: {mine.dtype} {mine.shape}, and {other.dtype} {other.shape}"
        elif _hash(ours, name) is None or _hash(ours, name) != _hash(theirs, name):
            yield from _difference(name, ours[name], theirs[name])


def _difference(name: str, mine: Tensor, other: Tensor) -> Iterator[str]:
    if torch.equal(mine.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
        return
    a, b = mine.double(), other.double()
    furthest, largest, unequal = float((a - b).abs().max()), float(a.abs().max()), int((a != b).sum())
    yield f"{name}: {unequal} of {a.numel()} numbers differ, by {furthest:.3g} at most (the largest is {largest:.3g})"


def _settings(a: Path, b: Path) -> Iterator[str]:
    """Differences of step, state and config, where both have them."""
    (ours, arm_a), (theirs, arm_b) = _stored(a), _stored(b)
    if ours is None or theirs is None:
        return
    if STATE in ours.manifest.files and STATE in theirs.manifest.files:
        mine, other = _flat(_lasting(ours.state)), _flat(_lasting(theirs.state))
        yield from (f"state: {line}" for line in _unequal(mine, other))
    name_a, name_b = f"{arm_a}config.yaml", f"{arm_b}config.yaml"
    if name_a in ours.manifest.files and name_b in theirs.manifest.files:
        configs = [_flat(yaml.safe_load(s.read_text(n))) for s, n in ((ours, name_a), (theirs, name_b))]
        yield from (f"config: {line}" for line in _unequal(*configs))


def _lasting(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of a state, what two runs of one training share."""
    arms = {
        name: {key: value for key, value in values.items() if key not in ("seconds", "history")}
        for name, values in state.get("arms", {}).items()
    }
    return {key: value for key, value in state.items() if key != "provenance"} | {"arms": arms}


def _unequal(mine: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(mine.keys() | other.keys()):
        if mine.get(key) != other.get(key):
            yield f"{key} is {mine.get(key)!r}, and {other.get(key)!r}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _only(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str) -> Iterator[str]:
    yield from (f"only the first has the {what} {name}" for name in ours if name not in theirs)
    yield from (f"only the second has the {what} {name}" for name in theirs if name not in ours)


def _hash(tensors: Tensors, name: str) -> str | None:
    digests = tensors.file(name).digests
    return None if digests is None else digests.tensors[name]
