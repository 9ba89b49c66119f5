"""Looking into checkpoints: what there is, and any tensor of it, read when asked for and held against its hash."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from swinmoe.checkpoint.manifest import MANIFEST, Manifest, check_file, check_size, read_manifest
from swinmoe.checkpoint.tensor_file import Band, Entry, TensorFile, bytes_of
from swinmoe.config import ModelConfig, RunConfig
from swinmoe.config.io import build, read_yaml
from swinmoe.errors import CheckpointError, DamagedError, did_you_mean

STATE = "state.json"
_STEP = re.compile(r"step-(\d{8,})")
_SHARD = re.compile(r"(?P<group>.+?)(?:-\d{5,}-of-\d{5,})?\.safetensors")


class Tensors(Mapping[str, Tensor]):
    """Tensors by their names in files, read from disk at every look.

    Args:
        label: what this is, for messages.
        files: where they are.
        names: those meant, where not all are.

    Raises:
        CheckpointError: a tensor is in several files.
    """

    def __init__(self, label: str, files: list[TensorFile], names: Collection[str] | None = None) -> None:
        self.label = label
        self.files = files
        self._homes: dict[str, TensorFile] = {}
        self._hashing: list[tuple[TensorFile, Future[None]]] = []
        self._pool: ThreadPoolExecutor | None = None
        for file in files:
            for name in file.entries:
                if names is not None and name not in names:
                    continue
                if name in self._homes:
                    both = f"{str(self._homes[name].path)!r} and {str(file.path)!r}"
                    raise CheckpointError(f"{label}: tensor {name!r} is in both {both}; remove the file that is wrong")
                self._homes[name] = file

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def __contains__(self, name: object) -> bool:
        return name in self._homes

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, checked; `KeyError` if there is none of that name."""
        entry, file = self.entry(name), self._homes[name]
        out = torch.empty(entry.shape, dtype=entry.dtype)
        file.read(name, out)
        file.check(name, bytes_of(out))
        return out

    def entry(self, name: str) -> Entry:
        """Type and shape, without a look at the data."""
        return self._homes[name].entries[name]

    def file(self, name: str) -> TensorFile:
        """Where a tensor is."""
        return self._homes[name]

    def read_into(self, name: str, out: Tensor, band: Band | None = None) -> None:
        """Fill `out` (any device, any floating type) with a tensor, or a band of it; of the file only that is read.

        A whole tensor is hashed while the next is read: nothing is certain before `settle`. A band cannot be checked.

        Raises:
            DamagedError: see `TensorFile.read`.
        """
        entry, file = self.entry(name), self._homes[name]
        direct = out.device.type == "cpu" and out.dtype == entry.dtype and out.is_contiguous()
        landed = out.detach() if direct else torch.empty(out.shape, dtype=entry.dtype)
        file.read(name, landed, band)
        if band is None and file.digests is not None:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")
            self._hashing.append((file, self._pool.submit(file.check, name, bytes_of(landed))))
            if not direct:
                self._hashing[-1][1].result()  # before its memory is given back
        if not direct:
            out.detach().copy_(landed)

    def settle(self) -> None:
        """Wait until everything read is checked.

        Raises:
            DamagedError: something is not what was written; names file and tensor.
        """
        waiting, self._hashing = self._hashing, []
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        for _, future in waiting:
            future.result()

    def verify(self) -> None:
        """Read everything through a small buffer, and check it."""
        for name, file in self._homes.items():
            file.verify(name)

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(self.entry(name).nbytes for name in self)

    @property
    def bytes_read(self) -> int:
        """Read from the files so far, headers included."""
        return sum(file.bytes_read for file in self.files)


@dataclass(frozen=True)
class Stored:
    """A complete checkpoint of this program on disk, or a model saved by it: `path` holds its manifest."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimiser steps; 0 for a model alone."""
        return self.manifest.step or 0

    @cached_property
    def state(self) -> dict[str, Any]:
        """The values of `state.json`, checked."""
        text = self.read_text(STATE)
        state: dict[str, Any] = json.loads(text)
        return state

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """Groups of tensors (`model`, `optimizer`, `average`; `ARM/model` where there are several arms) -> files."""
        found: dict[str, list[str]] = defaultdict(list)
        for name, record in self.manifest.files.items():
            match = _SHARD.fullmatch(name)
            if match is not None and record.tensors is not None:
                found[match["group"]].append(name)
        return dict(found)

    def read_text(self, name: str) -> str:
        """A text file of it, checked.

        Raises:
            DamagedError: it is missing or not what was written.
        """
        if name not in self.manifest.files:
            raise DamagedError(f"checkpoint {str(self.path)!r} lacks {name!r}")
        check_file(self.path, name, self.manifest.files[name])
        return (self.path / name).read_text(encoding="utf-8")

    def tensors(self, group: str) -> Tensors:
        """The tensors of a group.

        Raises:
            CheckpointError: there is no such group.
            DamagedError: a file is missing, or its header is not what was written.
        """
        if group not in self.groups:
            raise CheckpointError(f"checkpoint {str(self.path)!r} has no {group!r}; it has {sorted(self.groups)}")
        files = []
        for name in self.groups[group]:
            record = self.manifest.files[name]
            check_size(self.path, name, record)
            files.append(TensorFile(self.path / name, record.tensors))
        return Tensors(f"{group!r} of {str(self.path)!r}", files)

    def check(self) -> None:
        """Hold everything but the tensors' data against the manifest: every file's size, and what small files say.

        Raises:
            DamagedError: the first file that is missing or not what was written.
        """
        for name, record in self.manifest.files.items():
            check_file(self.path, name, record)

    def verify(self) -> None:
        """Read every file whole and hold it against the manifest.

        Raises:
            DamagedError: the first thing that is wrong; names the file and, where it can, the tensor.
        """
        self.check()
        for group in self.groups:
            self.tensors(group).verify()


def open_checkpoint(path: Path) -> Stored:
    """A checkpoint by its folder.

    Raises:
        DamagedError: it has no manifest, or a damaged one.
        CheckpointError: it is of another format.
    """
    return Stored(path, read_manifest(path))


def step_of(path: Path) -> int | None:
    """Steps by the folder's name, None if that is no checkpoint's."""
    match = _STEP.fullmatch(path.name)
    return None if match is None else int(match[1])


def checkpoints(folder: Path) -> list[Path]:
    """Everything in `folder` with a checkpoint's name, oldest first, whole or not."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if step_of(p) is not None), key=lambda p: step_of(p) or 0)


def is_complete(path: Path) -> bool:
    """The manifest is sound and every file is there with its size. Hashes are checked when tensors are read."""
    try:
        for name, record in read_manifest(path).files.items():
            check_size(path, name, record)
    except CheckpointError:
        return False
    return True


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None. Unfinished and truncated ones are passed over."""
    return next((path for path in reversed(checkpoints(folder)) if is_complete(path)), None)


# ------------------------------------------------------------------------------------------------- models of others


def locate(path: Path | str) -> tuple[Path, str]:
    """(the folder with the manifest, or the file; the arm's folder in it, "" for none) of what a user names.

    A run's folder, or its `checkpoints`, stands for its newest complete checkpoint.

    Raises:
        CheckpointError: there is nothing of the kind.
    """
    path = Path(path)
    if path.is_file() or (path / MANIFEST).is_file():
        return path, ""
    if (path.parent / MANIFEST).is_file() and path.is_dir():
        return path.parent, f"{path.name}/"
    for folder in (path / "checkpoints", path):
        latest = latest_checkpoint(folder)
        if latest is not None:
            return latest, ""
    if not path.exists():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(f"{str(path)!r} does not exist{did_you_mean(path.name, near)}")
    return path, ""


def read_model(path: Path | str, which: Literal["model", "average"] = "model") -> Tensors:
    """The weights in a checkpoint, a saved model, a `.safetensors` file, or a folder of such with or without an index.

    Nothing is read but headers until a tensor is asked for. Names are those in files: one key per expert, counted
    globally (`swinmoe.checkpoint.naming`), if this program wrote them.

    Args:
        path: see above; a run's folder stands for its newest complete checkpoint; `step-X/ARM` for one arm of several.
        which: the weights themselves, or their moving average.

    Raises:
        CheckpointError: nothing is there, nothing of that kind, or several arms of which one must be chosen.
        DamagedError: a file is not what was written.
    """
    place, arm = locate(path)
    if place.is_file():
        return Tensors(repr(str(place)), [TensorFile(place)])
    if not (place / MANIFEST).is_file():
        return _foreign(place)
    stored = open_checkpoint(place)
    group = f"{arm}{which}"
    if group in stored.groups:
        return stored.tensors(group)
    arms = sorted(name.removesuffix("/model") for name in stored.groups if name.endswith("/model"))
    if not arm and arms:
        raise CheckpointError(
            f"{str(place)!r} holds several models; name one: {', '.join(f'{place}/{a}' for a in arms)}"
        )
    if which == "average":
        raise CheckpointError(f"{str(path)!r} holds no moving average; it was trained without train.ema_decay")
    raise CheckpointError(f"{str(path)!r} holds no model; it has {sorted(stored.groups)}")


def model_config(path: Path | str) -> ModelConfig:
    """The architecture that a checkpoint or a saved model says it has.

    Raises:
        CheckpointError: it does not say.
        DamagedError: what it says is not what was written.
    """
    place, arm = locate(path)
    if place.is_dir() and (place / MANIFEST).is_file():
        stored = open_checkpoint(place)
        for name in (f"{arm}config.json", f"{arm}config.yaml"):
            if name in stored.manifest.files:
                stored.read_text(name)
    if place.is_file():
        place = place.parent
    if (place / arm / "config.json").is_file():
        return _from_json(place / arm / "config.json")
    if (place / arm / "config.yaml").is_file():
        return build(RunConfig, read_yaml(place / arm / "config.yaml")).model
    raise CheckpointError(
        f"{str(path)!r} does not say what model it holds: there is no config.json or config.yaml beside the weights; "
        "convert it, or name the preset"
    )


def _from_json(path: Path) -> ModelConfig:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(tree, dict) or tree.get("model_type") != "swinmoe" or not isinstance(tree.get("model"), dict):
        raise CheckpointError(
            f"{str(path)!r} describes no model of swinmoe (model_type is "
            f"{tree.get('model_type') if isinstance(tree, dict) else None!r}); use swinmoe convert"
        )
    return build(ModelConfig, tree["model"])


def _foreign(folder: Path) -> Tensors:
    """A folder that Hugging Face's tools wrote: an index and its shards, or one file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(named.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{str(index)!r} is no index of safetensors files: {error}") from error
        tensors = Tensors(repr(str(folder)), [TensorFile(_inside(folder, file)) for file in files])
        if missing := sorted(set(named) - set(tensors)):
            raise DamagedError(f"{str(index)!r} names {missing[0]!r}, which is not in {named[missing[0]]!r}")
        return tensors
    single = folder / "model.safetensors"
    if single.is_file():
        return Tensors(repr(str(single)), [TensorFile(single)])
    raise CheckpointError(
        f"{str(folder)!r} holds no checkpoint: neither {MANIFEST}, nor model.safetensors, nor an index of such files"
    )


def _inside(folder: Path, name: Any) -> Path:
    """A file named by an index, which must not lead elsewhere."""
    path = folder / str(name)
    if path.parent != folder:
        raise DamagedError(f"the index in {str(folder)!r} names {name!r}, which is not a file of that folder")
    return path
