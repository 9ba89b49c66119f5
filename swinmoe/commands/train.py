"""`swinmoe train`: train one model from a config."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from swinmoe.config import RunConfig
from swinmoe.config.io import load
from swinmoe.config.shrink import shrink
from swinmoe.train import train


def run(config: Path, overrides: list[str], *, shrunk: bool) -> None:
    """Load `config`, train, say where the results are."""
    resolved = load(RunConfig, config, overrides)
    folder, arm = train(shrink(resolved) if shrunk else resolved)
    if arm.mesh.rank == 0:
        Console(stderr=True).print(f"records, checkpoints and config: {folder}", markup=False)
