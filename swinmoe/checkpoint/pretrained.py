"""Models alone, in the Hugging Face manner: a folder with `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from swinmoe.checkpoint.manifest import MANIFEST, FileRecord, Manifest
from swinmoe.checkpoint.reader import locate, model_config, read_model
from swinmoe.checkpoint.saver import write_text
from swinmoe.checkpoint.spread import hold, read_held, stacks, wholes
from swinmoe.checkpoint.spread import shards as plan_shards
from swinmoe.checkpoint.tensor_file import TensorWriter
from swinmoe.config import ModelConfig
from swinmoe.config.io import build, merge, to_tree
from swinmoe.config.presets import PRESETS
from swinmoe.errors import CheckpointError, ConfigError
from swinmoe.models import SwinTransformer, build_model
from swinmoe.parallel import Mesh
from swinmoe.version import __version__

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?")
_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def save_pretrained(model: SwinTransformer, folder: Path | str) -> Path:
    """Write `model`, whole on this process, into `folder`: `config.json`, `model.safetensors`, a manifest; returns it.

    A model that was there is replaced, all of it, when everything is on the disk, and stays if anything fails before;
    other files in the folder stay. Experts have a key each, as in checkpoints (`swinmoe.checkpoint.naming`). Of a model
    spread over ranks save a checkpoint instead, and load that.

    Raises:
        ConfigError: the model's experts are spread over several processes.
        CheckpointError: the disk is full or not writable.
    """
    found = stacks(model)
    if any(stack.spread for stack in found.values()):
        raise ConfigError(
            "save_pretrained was given a model whose experts are spread over processes; give the whole model, or load "
            "one from a training checkpoint: swinmoe.from_pretrained('runs/NAME')"
        )
    folder, mesh = Path(folder), Mesh()
    groups = {"model": hold(model.state_dict(), found)}
    plan = plan_shards(groups, mesh)
    names = {shard.name: WEIGHTS if len(plan["model"]) == 1 else shard.name for shard in plan["model"]}
    records: dict[str, FileRecord] = {}
    writers: dict[str, TensorWriter] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for shard in plan["model"]:
            writers[shard.name] = TensorWriter(_fresh(folder, names[shard.name]), shard.shapes)
        for shard, item, value in wholes(groups, plan, mesh):
            writers[shard.name].write(item.name, value)
        for name, writer in writers.items():
            size, digests = writer.close()
            records[names[name]] = FileRecord(size, tensors=digests)
        texts = {CONFIG: _describe(model.config)}
        if len(names) > 1:
            named = {item.name: shard.name for shard in plan["model"] for item in shard.items}
            total = sum(item.nbytes for shard in plan["model"] for item in shard.items)
            index = {"metadata": {"total_size": total}, "weight_map": named}
            texts[f"{WEIGHTS}.index.json"] = json.dumps(index, indent=1)
        for name, text in texts.items():
            records[name] = write_text(_fresh(folder, name), text)
        write_text(_fresh(folder, MANIFEST), Manifest(records).dumps())
        before = _weights_in(folder)
        (folder / MANIFEST).unlink(missing_ok=True)  # until the last name is right, nothing vouches for any
        for name in (*records, MANIFEST):
            os.replace(_aside(folder, name), folder / name)
        for name in before - records.keys():
            (folder / name).unlink()
    except OSError as error:
        raise CheckpointError(
            f"could not write the model to {str(folder)!r}: {error}; free space or choose another folder"
        ) from error
    finally:
        for writer in writers.values():
            writer.abandon()
        for name in (*names.values(), CONFIG, f"{WEIGHTS}.index.json", MANIFEST):
            with suppress(OSError):
                _aside(folder, name).unlink(missing_ok=True)
    return folder


def _weights_in(folder: Path) -> set[str]:
    """Names of the files that an earlier model lies in: beside a new one they would say something else."""
    return {path.name for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name)}


def from_pretrained(
    source: Path | str,
    *,
    which: Literal["model", "average"] = "model",
    device: torch.device | str = "cpu",
    **changes: Any,
) -> SwinTransformer:
    """The model that `save_pretrained`, or a training run of any number of processes, left; in evaluation mode.

    Args:
        source: a saved model's folder, a checkpoint (`step-...`, or an arm's folder in it), a run's folder (its newest
            complete checkpoint), or OWNER/NAME on the Hugging Face hub, fetched by `huggingface_hub`.
        which: of a checkpoint, the weights or their moving average.
        device: where to put it.
        changes: keys of `ModelConfig` that do not change the shape of a weight, such as `drop_path_rate=0.1`.

    Raises:
        CheckpointError: nothing is there, nothing that fits, or several arms of which one must be named.
        DamagedError: a file is not what was written; names it and the tensor.
    """
    place = _fetched(source)
    cfg = model_config(place)
    if changes:
        cfg = build(ModelConfig, merge(to_tree(cfg), changes))
    weights = read_model(place, which)
    floating = [weights.entry(name).dtype for name in weights if weights.entry(name).dtype.is_floating_point]
    model = build_model(cfg, device=device, dtype=floating[0] if floating else None)
    read_held(hold(model.state_dict(), stacks(model)), weights, Mesh())
    weights.settle()
    return model.eval()


def _fetched(source: Path | str) -> Path:
    """A folder here."""
    path, name = Path(source), str(source)
    if path.exists():
        return locate(path)[0] if (path / MANIFEST).is_file() else path
    if name in PRESETS:
        raise CheckpointError(
            f"{name!r} is a preset, an architecture without weights: swinmoe.create_model({name!r}) draws them; for "
            "published weights convert their file (swinmoe convert) and give the folder that it writes"
        )
    if not _ON_THE_HUB.fullmatch(name) or (path.parent != Path() and path.parent.exists()):
        return locate(path)[0]  # says what is wrong with it
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # whatever the network, the hub and its client come up with
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{name!r} is no folder here, and the Hugging Face hub did not give it ({said}); give the folder of a "
            "saved model, a checkpoint or a run"
        ) from error


def _describe(cfg: ModelConfig) -> str:
    tree = {"model_type": "swinmoe", "architectures": ["SwinTransformer"], "swinmoe_version": __version__}
    return json.dumps(tree | {"model": to_tree(cfg)}, indent=1) + "\n"


def _aside(folder: Path, name: str) -> Path:
    return folder / f".writing-{name}"


def _fresh(folder: Path, name: str) -> Path:
    path = _aside(folder, name)
    path.unlink(missing_ok=True)
    return path
