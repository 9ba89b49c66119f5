"""Models that commands have made: written as a folder that every other command, and Hugging Face's tools, can open."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from swinmoe.checkpoint.export import write_files
from swinmoe.checkpoint.naming import to_files
from swinmoe.checkpoint.pretrained import save_pretrained
from swinmoe.checkpoint.source import Source
from swinmoe.errors import CheckpointError
from swinmoe.models import SwinTransformer


def check_free(folder: Path) -> None:
    """`CheckpointError` if something is in `folder`: before the work, not after it."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CheckpointError(f"{str(folder)!r} exists and is not empty; name another folder for the new model")


def save_model(model: SwinTransformer, folder: Path, moments: Mapping[str, Tensor] | None = None) -> None:
    """`save_pretrained`, and before it, if given, `optimizer.safetensors` (named as in checkpoints).

    Raises:
        CheckpointError: the disk is full or not writable; nothing of the model is there then.
    """
    if moments is not None:
        write_files(folder, {"optimizer.safetensors": moments_in_files(moments)})
    save_pretrained(model, folder)


def said_of(source: Source) -> str:
    """Which weights were taken, for people."""
    return f"{source.label}: the weights themselves" if source.weights == "model" else source.label


def moments_in_files(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`PARAMETER#KEY` as files name it: one tensor per expert, `X.experts.3.fc1.weight#exp_avg`; steps stay whole."""
    found: dict[str, Tensor] = {}
    for name, value in moments.items():
        parameter, _, key = name.partition("#")
        named = to_files({parameter: value}) if value.dim() else {parameter: value}
        found |= {f"{single}#{key}": part.detach().cpu().contiguous() for single, part in named.items()}
    return found
