"""`swinmoe report`: write the report of a run folder again from its records."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from swinmoe.report import write_report


def run(folder: Path) -> None:
    """Rewrite `folder`'s report; works on unfinished runs too."""
    paths = write_report(folder / "records.jsonl", folder)
    console = Console(stderr=True)
    console.print(paths.headline, markup=False)
    console.print(f"report: {paths.html}", markup=False, soft_wrap=True)
