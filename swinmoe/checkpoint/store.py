"""A checkpoint read back whole, for tools and tests: training reads what each rank needs (`spread.read_held`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from swinmoe.checkpoint.reader import open_checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` by group (`model`, `optimizer`, `average`; `ARM/model` where there are several arms) and name in files,
    and the JSON `state`."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint whole, and check every byte of it.

    Raises:
        DamagedError: names the file and the tensor that is missing or not what was written.
        CheckpointError: it is of another format.
    """
    stored = open_checkpoint(path)
    for name, record in stored.manifest.files.items():
        if record.tensors is None:
            stored.read_text(name)
    tensors = {group: dict(stored.tensors(group)) for group in sorted(stored.groups)}
    return Checkpoint(path, stored.step, tensors, stored.state)
