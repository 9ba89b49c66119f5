"""Checkpoints of running jobs: safetensors with a manifest, written aside and renamed."""

from swinmoe.checkpoint.store import Checkpoint, drop_newer, latest_checkpoint, load_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "drop_newer", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]
