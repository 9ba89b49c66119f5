"""Models that commands have made: written as a folder that every other command, and Hugging Face's tools, can open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from swinmoe.checkpoint.naming import to_files
from swinmoe.config.io import to_tree
from swinmoe.errors import CheckpointError
from swinmoe.models import SwinTransformer
from swinmoe.version import __version__


def check_free(folder: Path) -> None:
    """`CheckpointError` if something is in `folder`: before the work, not after it."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CheckpointError(f"{str(folder)!r} exists and is not empty; name another folder for the new model")


def save_model(model: SwinTransformer, folder: Path, moments: Mapping[str, Tensor] | None = None) -> None:
    """Write `config.json`, `model.safetensors` and, if given, `optimizer.safetensors` (named as in checkpoints).

    The config comes last, so that a folder that has one is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in to_files(model.state_dict()).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if moments is not None:
        save_file(moments_in_files(moments), folder / "optimizer.safetensors", metadata={"format": "pt"})
    tree = {"model_type": "swinmoe", "swinmoe_version": __version__, "model": to_tree(model.config)}
    (folder / "config.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def moments_in_files(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`PARAMETER#KEY` as files name it: one tensor per expert, `X.experts.3.fc1.weight#exp_avg`; steps stay whole."""
    found: dict[str, Tensor] = {}
    for name, value in moments.items():
        parameter, _, key = name.partition("#")
        named = to_files({parameter: value}) if value.dim() else {parameter: value}
        found |= {f"{single}#{key}": part.detach().cpu().contiguous() for single, part in named.items()}
    return found
