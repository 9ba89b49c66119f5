"""`swinmoe inspect`: what a checkpoint holds, without loading it; with `--verify`, whether it is what was written."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from swinmoe.checkpoint.manifest import MANIFEST, read_manifest
from swinmoe.checkpoint.naming import num_experts, stacked_key
from swinmoe.checkpoint.reader import (
    STATE,
    Stored,
    Tensors,
    checkpoints,
    is_complete,
    locate,
    open_checkpoint,
    read_model,
)
from swinmoe.errors import CheckpointError

_HASH_LETTERS = 12


def run(path: Path, *, verify: bool, tensors: bool) -> None:
    """Print what is at `path`: a checkpoint, a saved model, a safetensors file, or a folder of checkpoints.

    Raises:
        CheckpointError: there is nothing of the kind.
        DamagedError: a file is not what was written; without `verify`, as far as manifest and headers show it.
    """
    console = Console(highlight=False, soft_wrap=True)
    several = next((f for f in (path, path / "checkpoints") if f.is_dir() and checkpoints(f)), None)
    if several is not None:
        _list(several, console, verify)
        return
    place, arm = locate(path)
    if place.is_file() or not (place / MANIFEST).is_file():
        weights = read_model(path)
        console.print(f"{path}: no manifest, so nothing to hold it against", markup=False)
        console.print(_tree("model", weights, tensors))
        return
    stored = open_checkpoint(place)
    _head(stored, console)
    for group in sorted(stored.groups):
        if group.startswith(arm):
            console.print(_tree(group, stored.tensors(group), tensors))
    if verify:
        stored.verify()
        count = len(stored.manifest.files)
        console.print(f"verified: all {count} files are what was written, {_size(_total(stored))} read")


def _list(folder: Path, console: Console, verify: bool) -> None:
    """All checkpoints of a folder, a line each."""
    table = Table("checkpoint", "state", "size", "score")
    damaged = False
    for path in checkpoints(folder):
        state, size, score = "complete", "", ""
        try:
            stored = open_checkpoint(path)
            size = _size(_total(stored))
            score = "" if stored.manifest.score is None else f"{stored.manifest.score:.4f}"
            if verify:
                stored.verify()
                state = "verified"
            elif not is_complete(path):
                stored.verify()
        except CheckpointError as error:
            state, damaged = str(error), True
        table.add_row(path.name, state, size, score)
    console.print(table)
    if damaged:
        raise CheckpointError(f"not every checkpoint in {str(folder)!r} is whole")


def _head(stored: Stored, console: Console) -> None:
    manifest = read_manifest(stored.path)
    what = "saved model" if manifest.step is None else f"checkpoint at step {manifest.step}"
    score = "" if manifest.score is None else f", score {manifest.score:.4f}"
    console.print(f"{stored.path}: {what}{score}, {_size(_total(stored))} in {len(manifest.files)} files", markup=False)
    if STATE not in manifest.files:
        return
    state = stored.state
    where = state.get("sampler", {})
    console.print(f"epoch {where.get('epoch')}, batch {where.get('batch')} of {where.get('batches_per_epoch')}")
    for name, values in state.get("arms", {}).items():
        rate = values.get("lr", math.nan)
        console.print(f"arm {name}: step {values['step']}, {values['seconds']:.1f} s, rate {rate:.3g}", markup=False)
    made = state.get("provenance", {})
    code = f"swinmoe {made.get('swinmoe')}, torch {made.get('torch')}, commit {str(made.get('git_commit'))[:12]}"
    console.print(f"written by {code} on {made.get('world_size')} process(es)", markup=False)


def _tree(group: str, tensors: Tensors, every: bool) -> Tree:
    """The names of a group as a tree; experts of a layer in one line each part, unless `every` tensor is asked for."""
    experts = num_experts([name.partition("#")[0] for name in tensors])
    listed = "".join(f"\n  {layer}: {count} experts" for layer, count in experts.items())
    numbers = sum(math.prod(tensors.entry(name).shape) for name in tensors)
    root = Tree(f"{group}: {len(tensors)} tensors, {numbers:,} numbers, {_size(tensors.nbytes)}{listed}")
    branches: dict[str, Tree] = {"": root}
    for label, names in _gathered(tensors, every).items():
        parent, _, leaf = label.rpartition("/")
        entry = tensors.entry(names[0])
        kind = f"{str(entry.dtype).removeprefix('torch.')} {'x'.join(map(str, entry.shape)) or 'scalar'}"
        times = f"{len(names)} of " if len(names) > 1 else ""
        _branch(branches, parent).add(f"{leaf}  {times}{kind}{_hash(tensors, names)}")
    return root


def _gathered(tensors: Mapping[str, object], every: bool) -> dict[str, list[str]]:
    """Names by the line that they share, as paths with slashes."""
    lines: dict[str, list[str]] = {}
    for name in sorted(tensors, key=_natural):
        stem, sharp, key = name.partition("#")
        place = None if every else stacked_key(stem)
        if place is not None and place[0].rpartition(".")[0].endswith("experts"):
            layer, _, part = place[0].rpartition(".")
            stem = f"{layer}.*.{part.replace('_', '.')}"
        head, _, leaf = stem.rpartition(".")
        leaf = f"{leaf}{sharp}{key}"
        if ".*." in stem:
            head, _, part = stem.partition(".*.")
            leaf = f"*.{part}{sharp}{key}"
        lines.setdefault(f"{head.replace('.', '/')}/{leaf}" if head else leaf, []).append(name)
    return lines


def _branch(branches: dict[str, Tree], path: str) -> Tree:
    if path not in branches:
        parent, _, name = path.rpartition("/")
        branches[path] = _branch(branches, parent).add(name)
    return branches[path]


def _hash(tensors: Tensors, names: list[str]) -> str:
    digests = tensors.file(names[0]).digests
    return f"  {digests.tensors[names[0]][:_HASH_LETTERS]}" if len(names) == 1 and digests is not None else ""


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which 10 comes after 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _total(stored: Stored) -> int:
    return sum(record.size for record in stored.manifest.files.values())


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
