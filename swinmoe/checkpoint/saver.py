"""Writing checkpoints: all ranks in parallel, aside, synced, renamed; in the background if asked to.

    step-00001234/                             one arm; of several, each has a folder of its own in it
      config.yaml                              the run
      model-00001-of-00002.safetensors ...     what one rank wrote; one key per expert, counted globally
      model.safetensors.index.json             tensor -> file, as Hugging Face's tools read it
      average-*, optimizer-*                   likewise
      state.json                               counters, position, provenance
      manifest.json                            sizes and hashes of all of these
    latest                                     the name of the newest, for people and scripts

The folders of one job are on a file system that all its ranks see.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swinmoe.checkpoint.manifest import MANIFEST, FileRecord, Manifest, read_manifest
from swinmoe.checkpoint.outcome import share
from swinmoe.checkpoint.reader import STATE, checkpoints, is_complete, step_of
from swinmoe.checkpoint.spread import Held, Shard, shards, wholes
from swinmoe.checkpoint.tensor_file import TensorWriter, named, sha256
from swinmoe.errors import CheckpointError
from swinmoe.parallel import Mesh

LATEST = "latest"
_ASIDE, _GOING = ".writing-", ".deleting-"


@dataclass(frozen=True)
class Content:
    """What one arm saves."""

    groups: Mapping[str, Mapping[str, Held]]
    """`model`, `optimizer`, `average` -> tensors as this rank holds them."""
    config: str
    """The text of its `config.yaml`."""


@dataclass
class _Flight:
    """A checkpoint on its way."""

    step: int
    score: float | None
    aside: Path
    plan: Mapping[str, list[Shard]]
    texts: dict[str, str]
    records: dict[str, FileRecord] = field(default_factory=dict)
    """Of the files that this rank has written."""
    error: Exception | None = None
    left: Exception | None = None
    """Why older checkpoints could not be removed: this one is there nevertheless."""
    thread: threading.Thread | None = None
    publishing: bool = False


class Saver:
    """Saves the checkpoints of one job into `folder`. All ranks construct it and call its methods alike.

    Args:
        folder: of all checkpoints; every rank sees it.
        mesh: this rank's place.
        keep_last: the newest so many stay.
        keep_best: and so many with the highest scores.
        asynchronous: `save` returns when the values are copied; `advance` at later steps brings the rest to its end.
    """

    def __init__(
        self, folder: Path, mesh: Mesh, *, keep_last: int, keep_best: int = 0, asynchronous: bool = False
    ) -> None:
        self.folder, self.mesh = folder, mesh
        self.keep_last, self.keep_best, self.asynchronous = keep_last, keep_best, asynchronous
        self.last_step: int | None = None
        """Of the newest checkpoint that `save` was called for."""
        self._flight: _Flight | None = None
        self._copies: dict[str, Tensor] = {}

    @property
    def in_flight(self) -> bool:
        """A checkpoint is on its way: the same on all ranks."""
        return self._flight is not None

    @property
    def busy(self) -> bool:
        """This rank is still writing."""
        return self._flight is not None and self._flight.thread is not None and self._flight.thread.is_alive()

    def save(self, step: int, arms: Mapping[str, Content], state: Mapping[str, Any], score: float | None) -> None:
        """Write `folder/step-XXXXXXXX`, and remove what need not be kept. A collective call.

        Args:
            step: optimiser steps done.
            arms: what to save, by the arm's name; a single one lies at the top of the folder.
            state: JSON values.
            score: for `keep_best`; higher is better, None = not to be compared.

        Raises:
            CheckpointError: on all ranks, if a file of any of them could not be written, of this checkpoint or of the
                one that was on its way; earlier checkpoints are as they were.
        """
        self.finish()
        prefixes = {name: "" if len(arms) == 1 else f"{name}/" for name in arms}
        aside = self.folder / f"{_ASIDE}step-{step:08d}"
        self._all_or_none(lambda: self._make_room(aside, prefixes), step)
        groups = {
            f"{prefixes[name]}{group}": held for name, content in arms.items() for group, held in content.groups.items()
        }
        plan = shards(groups, self.mesh)
        texts = {f"{prefixes[name]}config.yaml": content.config for name, content in arms.items()}
        texts |= {f"{group}.safetensors.index.json": _index(plan[group]) for group in groups if plan[group]}
        texts[STATE] = json.dumps(
            {**state, "step": step, "score": score, "folders": prefixes}, indent=1, ensure_ascii=False
        )
        flight = self._flight = _Flight(step, score, aside, plan, texts)
        self.last_step = step
        if not self.asynchronous:
            _write(flight, self.mesh, lambda put: _put_each(put, wholes(groups, plan, self.mesh)))
            self.finish()
            return
        copied = [
            (shard, item, self._copy(item.name, shard, value)) for shard, item, value in wholes(groups, plan, self.mesh)
        ]
        self._start(lambda: _write(flight, self.mesh, lambda put: _put_each(put, copied)))

    def advance(self) -> None:
        """One stage on: to be called on all ranks when none is `busy`. A collective call.

        Raises:
            CheckpointError: as `save`.
        """
        flight = self._flight
        if flight is None:
            return
        if flight.thread is not None:
            flight.thread.join()
            flight.thread = None
        if not flight.publishing:
            try:
                found = share(self.mesh, _explain(flight), flight.records)
            except CheckpointError:
                self._give_up(flight)
                raise
            flight.records = {name: record for of_rank in found for name, record in of_rank.items()}
            flight.publishing = True
            if self.mesh.is_main and self.asynchronous:
                self._start(lambda: self._publish(flight))
            elif self.mesh.is_main:
                self._publish(flight)
            return
        try:
            share(self.mesh, _explain(flight), None)
        except CheckpointError:
            self._give_up(flight)
            raise
        self._flight = None
        if flight.left is not None:
            warnings.warn(
                f"checkpoint {str(self._final(flight))!r} is saved, but older ones could not be removed "
                f"({flight.left}): the disk may fill; remove them by hand",
                RuntimeWarning,
                stacklevel=2,
            )

    def finish(self) -> None:
        """Bring what is on its way to its end. A collective call.

        Raises:
            CheckpointError: as `save`.
        """
        while self._flight is not None:
            self.advance()

    def _start(self, work: Callable[[], None]) -> None:
        assert self._flight is not None
        self._flight.thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._flight.thread.start()

    def _all_or_none(self, work: Callable[[], None], step: int) -> None:
        """`work` on the main rank; if it fails, an error on all."""
        problem = None
        try:
            if self.mesh.is_main:
                work()
        except OSError as error:
            problem = _cannot_write(self.folder / f"step-{step:08d}", error)
        share(self.mesh, problem, None)

    def _make_room(self, aside: Path, prefixes: Mapping[str, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.iterdir():  # by a job that was killed
            if left.name.startswith((_ASIDE, _GOING)):
                _remove(left)
        for prefix in prefixes.values():
            (aside / prefix).mkdir(parents=True, exist_ok=True)

    def _copy(self, name: str, shard: Shard, value: Tensor) -> Tensor:
        """A copy on the host, in memory that earlier copies of the same tensor have used: fresh pages cost time."""
        key = f"{shard.name} {name}"
        copy = self._copies.get(key)
        if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
            copy = self._copies[key] = torch.empty(value.shape, dtype=value.dtype)
        return copy.copy_(value)

    def _give_up(self, flight: _Flight) -> None:
        self._flight = None
        if self.mesh.is_main:
            shutil.rmtree(flight.aside, ignore_errors=True)

    def _publish(self, flight: _Flight) -> None:
        """The main rank's last part: manifest, names, and the end of old checkpoints. Whatever goes wrong is kept for
        `advance`: in a thread nobody else would see it, and the other ranks wait there."""
        final = self._final(flight)
        try:
            for name, text in flight.texts.items():
                flight.records[name] = write_text(flight.aside / name, text)
            manifest = Manifest(flight.records, flight.step, flight.score)
            write_text(flight.aside / MANIFEST, manifest.dumps())
            for folder in {(flight.aside / name).parent for name in flight.records} | {flight.aside}:
                _sync(folder)
            if final.exists():
                _discard(final)
            flight.aside.rename(final)
            _sync(self.folder)
            point_to(self.folder, final.name)
        except Exception as error:
            flight.error = error
            return
        try:
            self._prune(final)
        except Exception as error:
            flight.left = error

    def _final(self, flight: _Flight) -> Path:
        return self.folder / f"step-{flight.step:08d}"

    def _prune(self, newest: Path) -> None:
        others = [path for path in checkpoints(self.folder) if path != newest and is_complete(path)]
        kept = set(others[max(0, len(others) - (self.keep_last - 1)) :])
        scores = {path: read_manifest(path).score for path in [*others, newest]} if self.keep_best else {}
        scored = [(score, step_of(path) or 0, path) for path, score in scores.items() if score is not None]
        kept |= {path for _, _, path in sorted(scored, reverse=True)[: self.keep_best]}
        for path in others:
            if path not in kept:
                _discard(path)


Put = Callable[[Shard, str, Tensor], None]


def _put_each(put: Put, values: Any) -> None:
    for shard, item, value in values:
        put(shard, item.name, value)


def _write(flight: _Flight, mesh: Mesh, produce: Callable[[Put], None]) -> None:
    """Write this rank's files. An error is kept, and the rest let pass: other ranks wait for slices of this one's."""
    writers: dict[str, TensorWriter] = {}

    def put(shard: Shard, name: str, value: Tensor) -> None:
        if flight.error is None:
            try:
                writers[shard.name].write(name, value)
            except OSError as error:
                flight.error = error

    mine = [shard for files in flight.plan.values() for shard in files if shard.writer == mesh.rank]
    try:
        for shard in mine:
            writers[shard.name] = TensorWriter(flight.aside / shard.name, shard.shapes)
    except OSError as error:
        flight.error = error
    try:
        produce(put)
        if flight.error is None:
            for name, writer in writers.items():
                size, digests = writer.close()
                flight.records[name] = FileRecord(size, tensors=digests)
    except OSError as error:
        flight.error = error
    except Exception as error:  # in a thread nobody else would see it
        if threading.current_thread() is threading.main_thread():
            raise
        flight.error = error
    finally:
        for writer in writers.values():
            writer.abandon()


def _explain(flight: _Flight) -> CheckpointError | None:
    if flight.error is None:
        return None
    return _cannot_write(flight.aside.with_name(flight.aside.name.removeprefix(_ASIDE)), flight.error)


def _cannot_write(final: Path, error: Exception) -> CheckpointError:
    way_out = "free space or choose another output_dir"
    if not isinstance(error, OSError):  # the disk has nothing to do with it
        way_out = f"this is a {type(error).__name__}, which --debug shows whole"
    said = CheckpointError(
        f"could not write checkpoint {str(final)!r}: {error}; earlier checkpoints are intact; {way_out}"
    )
    said.__cause__ = error
    return said


def _index(files: list[Shard]) -> str:
    total = sum(item.nbytes for shard in files for item in shard.items)
    names = {item.name: Path(shard.name).name for shard in files for item in shard.items}
    return json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}, indent=1, ensure_ascii=False
    )


def write_text(path: Path, text: str) -> FileRecord:
    """Write a small file and bring it to the disk."""
    data = text.encode()
    with named(path, "writing it"), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), sha256(data))


def point_to(folder: Path, name: str) -> None:
    """Let `folder/latest` say `name`, at once."""
    aside = folder / f"{_ASIDE}{LATEST}"
    write_text(aside, f"{name}\n")
    aside.rename(folder / LATEST)
    _sync(folder)


def drop_newer(folder: Path, step: int, damaged: Collection[Path] = ()) -> list[Path]:
    """Set aside what lies beyond `step`, when a run goes on from an earlier checkpoint: a branch given up.

    Complete checkpoints are removed; those cut off, or known to be `damaged`, are renamed `damaged-step-...` for
    somebody to look at. Returns their new paths.
    """
    set_aside = []
    for path in checkpoints(folder):
        if (step_of(path) or 0) <= step:
            continue
        if path not in damaged and is_complete(path):
            _discard(path)
            continue
        kept = path.with_name(f"damaged-{path.name}")
        _remove(kept)
        path.rename(kept)
        set_aside.append(kept)
    if (folder / f"step-{step:08d}").is_dir():
        point_to(folder, f"step-{step:08d}")
    else:
        (folder / LATEST).unlink(missing_ok=True)
    return set_aside


def _discard(path: Path) -> None:
    """Remove a checkpoint: its name first, so that none is ever seen half removed."""
    going = path.with_name(f"{_GOING}{path.name}")
    _remove(going)
    path.rename(going)
    _remove(going)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
