"""`swinmoe compare`: train twins side by side and report what sparsity bought."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from rich.console import Console

from swinmoe.compare import compare
from swinmoe.config import CompareConfig, RunConfig
from swinmoe.config.io import load
from swinmoe.config.shrink import shrink_comparison
from swinmoe.errors import ConfigError


def run(config: Path, overrides: list[str], *, shrunk: bool) -> None:
    """Load `config`, train all arms and seeds, say where the report is and what it shows."""
    _check_heads(overrides)
    resolved = load(CompareConfig, config, overrides)
    paths = compare(shrink_comparison(resolved) if shrunk else resolved)
    if paths is not None:
        console = Console(stderr=True)
        console.print(f"\n{paths.headline}", markup=False)
        console.print(f"report: {paths.html} (open in a browser), {paths.markdown}", markup=False, soft_wrap=True)


def _check_heads(overrides: list[str]) -> None:
    """Refuse `train.steps=9`: a comparison has the keys of its runs one step down."""
    own, of_runs = ({field.name for field in fields(kind)} for kind in (CompareConfig, RunConfig))
    for override in overrides:
        head = override.split("=")[0].split(".")[0]
        if head in of_runs - own:
            raise ConfigError(
                f"{override}: {head!r} is a run's; both arms have base.{override}, one alone arms.NAME.{override}"
            )
