"""`swinmoe compare`: train twins side by side and report what sparsity bought."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from swinmoe.compare import compare
from swinmoe.config import CompareConfig
from swinmoe.config.io import load
from swinmoe.config.shrink import shrink_comparison


def run(config: Path, overrides: list[str], *, shrunk: bool) -> None:
    """Load `config`, train all arms and seeds, say where the report is and what it shows."""
    resolved = load(CompareConfig, config, overrides)
    paths = compare(shrink_comparison(resolved) if shrunk else resolved)
    if paths is not None:
        console = Console(stderr=True)
        console.print(f"\n{paths.headline}", markup=False)
        console.print(f"report: {paths.html} (open in a browser), {paths.markdown}", markup=False, soft_wrap=True)
