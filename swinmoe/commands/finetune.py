"""`swinmoe finetune`: train on from somebody's weights."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from swinmoe.train.finetune import finetune, plan_finetuning


def run(config: Path, source: Path | None, overrides: list[str]) -> None:
    """Load `config` and the weights of `source`, train, say where the results are."""
    folder, arm = finetune(plan_finetuning(config, source, overrides))
    if arm.mesh.rank == 0:
        Console(stderr=True).print(f"records, checkpoints and config: {folder}", markup=False)
