"""Checkpoints of running jobs: safetensors with a manifest, written aside and renamed."""

from swinmoe.checkpoint.store import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]
