"""Checkpoints without a world size: safetensors with a manifest, one key per expert, written aside and renamed."""

from swinmoe.checkpoint.outcome import share
from swinmoe.checkpoint.reader import (
    Stored,
    Tensors,
    checkpoints,
    is_complete,
    latest_checkpoint,
    model_config,
    open_checkpoint,
    read_model,
)
from swinmoe.checkpoint.saver import Content, Saver, drop_newer
from swinmoe.checkpoint.spread import Held, Stack, form_slice_groups, hold, read_held, stacks
from swinmoe.checkpoint.store import Checkpoint, load_checkpoint

__all__ = [
    "Checkpoint",
    "Content",
    "Held",
    "Saver",
    "Stack",
    "Stored",
    "Tensors",
    "checkpoints",
    "drop_newer",
    "form_slice_groups",
    "hold",
    "is_complete",
    "latest_checkpoint",
    "load_checkpoint",
    "model_config",
    "open_checkpoint",
    "read_held",
    "read_model",
    "share",
    "stacks",
]
