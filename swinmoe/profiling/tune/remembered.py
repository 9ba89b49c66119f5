"""What was found before: the best way of every shape, in a small JSON file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from swinmoe.comm.neighbours import SWITCH
from swinmoe.config import RunConfig
from swinmoe.config.io import to_tree
from swinmoe.errors import ConfigError
from swinmoe.profiling.tune.ways import Way
from swinmoe.version import __version__

_NOT_OF_A_STEP = ("epochs", "steps", "eval_batch_size", "eval_every_epochs", "dead_expert_window")
"""Keys of `train` that tell how long and how often."""


def default_file() -> Path:
    """`swinmoe/exchange.json` in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`)."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "swinmoe" / "exchange.json"


def shape_of(run: RunConfig, world: int, local_world: int, device: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that a time depends on and a way does not change.

    Args:
        run: everything counts but names, seed, data, lengths, rates, and the keys that a way sets.
        world, local_world: ranks, and those of one machine.
        device: its name.
        options: of the measurement that bear on what is best.
    """
    assert run.model.moe is not None
    chosen = asdict(Way.of(run)).keys()
    model = to_tree(run.model)
    model["moe"] = _without(model["moe"], chosen)
    return {
        "model": model,
        "train": _without(to_tree(run.train), _NOT_OF_A_STEP),
        "parallel": _without(to_tree(run.parallel), {*chosen, "timeout_minutes"}),
        "clip_grad_norm": run.optim.clip_grad_norm,
        "layer_decay": run.optim.layer_decay,
        "world": world,
        "processes_per_machine": local_world,
        "device": device,
        "threads": torch.get_num_threads(),
        "shared_memory": os.environ.get(SWITCH, "1"),
        "torch": str(torch.__version__),
        "swinmoe": __version__,
        **options,
    }


def _without(tree: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in keys}


class RememberedWays:
    """Reads and writes the file; of several processes only one should."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, shape: Mapping[str, Any]) -> Way | None:
        """What was best for this shape; None if it was never measured.

        Raises:
            ConfigError: the file is not what `keep` writes.
        """
        entry = self._entries().get(_digest(shape))
        return None if entry is None else Way(**entry["way"])

    def keep(self, shape: Mapping[str, Any], way: Way, ms: float) -> None:
        """Remember a way; what others have written meanwhile stays."""
        entries = self._entries() | {_digest(shape): {"way": asdict(way), "ms": ms, "shape": dict(shape)}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"entries": entries}, file, indent=1)
            file.write("\n")
        os.replace(name, self.path)  # readers see the old file or the new one

    def _entries(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))["entries"]
            for entry in entries.values():
                Way(**entry["way"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{str(self.path)!r} does not hold remembered ways ({type(error).__name__}: {error}); remove it, or "
                "give another --cache"
            ) from error
        return dict(entries)


def _digest(shape: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]
