"""What weights may be loaded from, and how each is read: one name and shape for every tensor, ours.

A source is a state dict; a file (`.pth`, `.safetensors` ...); the files of all ranks of a Swin-MoE job, as a list, as a
folder, as the zip they were published in, or by the name before `.rank0`; a folder of swinmoe's or Hugging Face's.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from swinmoe.checkpoint.huggingface import settings_of
from swinmoe.checkpoint.layouts import recognise
from swinmoe.checkpoint.manifest import MANIFEST
from swinmoe.checkpoint.naming import to_files
from swinmoe.checkpoint.reader import checkpoints, locate, model_config, open_checkpoint, read_model
from swinmoe.checkpoint.tutel import join_ranks
from swinmoe.checkpoint.unpickle import find_tensors, read_pickle
from swinmoe.config import ModelConfig
from swinmoe.errors import CheckpointError, DamagedError

Which = Literal["auto", "model", "average"]
SourceLike = Mapping[str, Tensor] | str | Path | Sequence[str | Path]

_RANK = re.compile(r"(?P<stem>.*)\.rank(?P<rank>\d+)")
_WEIGHTS = re.compile(r"\.(pth|pt|bin|ckpt|global|master|rank\d+)$")


@dataclass(frozen=True)
class Member:
    """A file within an archive."""

    label: str
    data: io.BytesIO


File = Path | Member
AnyFile = TypeVar("AnyFile", Path, Member, File)
_OF_MODELS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Source:
    """Weights under our names in files."""

    label: str
    layout: str
    named: dict[str, Tensor]
    unused: tuple[str, ...] = ()
    """Names of the source that have no counterpart here."""
    changed: dict[str, str] = field(default_factory=dict)
    """Taken and changed in reading: name -> how."""
    derived: tuple[str, ...] = ()
    """Names of the source for what follows from the configuration: indices, masks, counts."""
    aside: dict[str, Tensor] = field(default_factory=dict)
    """Those of them that tell of windows, by names of ours."""
    config: ModelConfig | None = None
    """Where the source has one of ours."""
    hints: dict[str, Any] = field(default_factory=dict)
    """What another library's configuration beside the weights says, as keys of `ModelConfig`."""
    weights: Literal["model", "average"] = "model"
    """Of a run's checkpoint, which were read."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating type that holds every weight; None where there is none that a model can have."""
        found = {tensor.dtype for tensor in self.named.values()} & set(_OF_MODELS)
        return reduce(torch.promote_types, found) if found else None


def read_source(source: SourceLike, allow: Sequence[str] = (), which: Which = "auto") -> Source:
    """Read `source`, whatever it is.

    Args:
        source: see above.
        allow: names of what ranks may differ in (`join_ranks`).
        which: of a run's checkpoint the weights or their moving average; `auto`: the average if there is one.

    Raises:
        CheckpointError: nothing there, damaged, incomplete, of no known layout, or asking for more than tensors; or no
            moving average though one is asked for.
    """
    found = _read_any(source, allow, which)
    if which == "average" and found.weights != "average":
        raise CheckpointError(f"{found.label} holds no moving average; use the weights themselves ('auto' or 'model')")
    return found


def _read_any(source: SourceLike, allow: Sequence[str], which: Which) -> Source:
    if isinstance(source, Mapping):
        return _interpret(find_tensors(source, "the state dict"), "the state dict")
    if isinstance(source, str | Path):
        return _read_path(Path(source), allow, which)
    paths = [Path(path) for path in source]
    if len(paths) == 1:
        return _read_path(paths[0], allow, which)
    if len({path.name for path in paths}) < len(paths):
        raise CheckpointError(f"of {len(paths)} files some have the same name; give the files of one folder")
    return _read_several({path.name: path for path in paths}, f"{len(paths)} files", allow)


def _read_path(path: Path, allow: Sequence[str], which: Which) -> Source:
    label = str(path)
    if path.is_dir():
        return _read_folder(path, allow, which)
    if path.suffix == ".zip" and path.exists():
        return _read_archive(path, allow)
    ranked = _RANK.fullmatch(path.name)
    stem = ranked["stem"] if ranked and path.exists() else path.name
    siblings = {p.name: p for p in path.parent.iterdir()} if path.parent.is_dir() else {}
    if not path.exists() or ranked:
        of_ranks = _of_stem(stem, siblings)
        if any(_RANK.fullmatch(name) for name in of_ranks):
            return _read_ranks(stem, of_ranks, str(path.with_name(stem)), allow)
        if f"{path.name}.global" in siblings:
            return _interpret(_read_file(siblings[f"{path.name}.global"]), label)
        raise CheckpointError(f"{label!r} does not exist, nor {label + '.rank0'!r}; give a file, a folder or all files")
    found = _interpret(_read_file(path), label)
    return replace(found, config=_config_of(path)) if path.suffix == ".safetensors" else found


def _read_folder(folder: Path, allow: Sequence[str], which: Which) -> Source:
    here = (folder, folder / "checkpoints")
    if (folder / MANIFEST).is_file() or any(folder.glob("*.safetensors")) or any(checkpoints(place) for place in here):
        weights = which if which != "auto" else "average" if _averaged(folder) else "model"
        label = f"{folder} (moving average)" if weights == "average" else str(folder)
        found = _interpret(dict(read_model(folder, weights)), label)
        return replace(found, config=_config_of(folder), hints=_hints_of(folder), weights=weights)
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles:
        found = _interpret(_merge({path.name: _read_file(path) for path in pickles}), str(folder))
        return replace(found, hints=_hints_of(folder))
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    stems = _stems(files)
    if len(stems) == 1:
        return _read_ranks(stems[0], _of_stem(stems[0], files), str(folder), allow)
    if stems:
        raise CheckpointError(f"{str(folder)!r} holds several checkpoints {stems}; name one of them")
    single = [path for name, path in files.items() if name.endswith((".pth", ".pt", ".pth.global"))]
    if len(single) == 1:
        return _interpret(_read_file(single[0]), str(single[0]))
    raise CheckpointError(
        f"{str(folder)!r} holds no model.safetensors, no files of ranks, and {len(single)} .pth files; name the file"
    )


def _averaged(folder: Path) -> bool:
    """True for a run's checkpoint with a moving average."""
    place, arm = locate(folder)
    return (place / MANIFEST).is_file() and f"{arm}average" in open_checkpoint(place).groups


def _config_of(path: Path) -> ModelConfig | None:
    """What model it says it is, where that is one of ours."""
    try:
        return model_config(path)
    except DamagedError:
        raise
    except CheckpointError:
        return None


def _hints_of(folder: Path) -> dict[str, Any]:
    try:
        return settings_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{str(folder / 'config.json')!r} is not JSON: {error}") from error


def _read_archive(path: Path, allow: Sequence[str]) -> Source:
    """A zip's files of weights; notes beside them, and what systems put into archives, are passed over."""
    members: dict[str, tuple[str, io.BytesIO]] = {}
    member = ""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                name = member.rpartition("/")[2]
                if member.startswith("__MACOSX/") or name.startswith(".") or not _WEIGHTS.search(name):
                    continue
                if name in members:
                    raise CheckpointError(
                        f"{str(path)!r} holds both {members[name][0]!r} and {member!r}; give the files of one model"
                    )
                members[name] = member, io.BytesIO(archive.read(member))
    except CheckpointError:
        raise
    except Exception as error:  # bad headers raise as much as bad contents, and not only what the library declares
        at = f" at {member!r}" if member else ""
        raise CheckpointError(f"{str(path)!r} is damaged{at}, or no zip: {error}; get it again") from error
    if not members:
        raise CheckpointError(f"{str(path)!r} holds no file of weights (.pth, .pt, .bin, .pth.rank0 ...)")
    files = {name: Member(f"{str(path)!r}, {member!r}", data) for name, (member, data) in members.items()}
    return _read_several(files, str(path), allow)


def _read_several(files: Mapping[str, File], label: str, allow: Sequence[str]) -> Source:
    """Files of ranks of one checkpoint, or files that share a model out; all of them count."""
    stems = _stems(files)
    if not stems:
        return _interpret(_merge({name: _read_file(file) for name, file in files.items()}), label)
    others = sorted(set(files) - set(_of_stem(stems[0], files)))
    if len(stems) > 1 or others:
        raise CheckpointError(
            f"{label} are not of one checkpoint: there are ranks of {stems}"
            + (f" and, no rank of {stems[0]!r}, {others[:4]}" if len(stems) == 1 else "")
            + "; give the files NAME.rank0, NAME.rank1 ... and NAME.master of one NAME"
        )
    return _read_ranks(stems[0], files, label, allow)


def _stems(files: Iterable[str]) -> list[str]:
    """NAME of every NAME.rankN."""
    return sorted({match["stem"] for name in files if (match := _RANK.fullmatch(name))})


def _of_stem(stem: str, files: Mapping[str, AnyFile]) -> dict[str, AnyFile]:
    """Of `files` those of the ranks of one checkpoint, and what they share."""
    ranks = {name: file for name, file in files.items() if (match := _RANK.fullmatch(name)) and match["stem"] == stem}
    return ranks | {name: files[name] for name in (f"{stem}.master",) if name in files}


def _read_ranks(stem: str, files: Mapping[str, File], label: str, allow: Sequence[str]) -> Source:
    numbers: dict[int, str] = {}
    for name in files:
        if (found := _RANK.fullmatch(name)) is not None:
            if int(found["rank"]) in numbers:
                raise CheckpointError(f"{label}: {name!r} and {numbers[int(found['rank'])]!r} are of the same rank")
            numbers[int(found["rank"])] = name
    missing = sorted(set(range(max(numbers) + 1)) - set(numbers))
    if missing:
        raise CheckpointError(
            f"{label} lacks the files of ranks {missing}; all are needed, since each has other experts"
        )
    ranks = [_read_file(files[numbers[rank]]) for rank in sorted(numbers)]
    master = _read_file(files[f"{stem}.master"]) if f"{stem}.master" in files else None
    state, notes = join_ranks(ranks, master, allow)
    return _interpret(state, label, notes)


def _merge(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Files that share one model's tensors out among them."""
    homes: dict[str, str] = {}
    state: dict[str, Tensor] = {}
    for file, part in parts.items():
        for name, tensor in part.items():
            if name in state:
                raise CheckpointError(
                    f"{name!r} is in both {homes[name]!r} and {file!r}, which are not the files of ranks (NAME.rank0, "
                    "NAME.rank1 ...); give the files of one model"
                )
            homes[name], state[name] = file, tensor
    return state


def _read_file(file: File) -> dict[str, Tensor]:
    if isinstance(file, Member):
        return read_pickle(file.data, file.label)
    if not file.exists():
        raise CheckpointError(f"{str(file)!r} does not exist; give the file of weights")
    if file.suffix == ".safetensors":
        return dict(read_model(file))
    return read_pickle(file, repr(str(file)))


def _interpret(state: Mapping[str, Tensor], label: str, notes: Mapping[str, str] | None = None) -> Source:
    layout, stripped = recognise(state, label)
    tensors, unused = layout.read(stripped)
    changed: dict[str, str] = {}
    for name, note in (notes or {}).items():
        ours = layout.read({name: state[name]})[0] if name in stripped else {}
        changed |= dict.fromkeys(to_files(ours), note)
    derived = tuple(name for name in stripped if layout.is_derived(name))
    return Source(label, layout.name, to_files(tensors), tuple(unused), changed, derived, layout.aside(stripped))
