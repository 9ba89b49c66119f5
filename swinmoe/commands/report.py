"""`swinmoe report`: write the report of a run folder, or of profiles, again from its records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from swinmoe.errors import ConfigError
from swinmoe.records import read_records
from swinmoe.report import has_measurements, has_profile, write_profile_report, write_report


def run(folders: Sequence[Path], out: Path | None = None) -> None:
    """Rewrite a folder's report; works on unfinished runs too. Profiles of several folders share one page.

    Args:
        folders: with a records.jsonl each.
        out: where the report goes; None = into the first of `folders`.

    Raises:
        ConfigError: several folders that are not all of `swinmoe profile`.
    """
    records = [folder / "records.jsonl" for folder in folders]
    profiled = [has_profile(read_records(path)) for path in records]
    if len(folders) > 1 and not all(profiled):
        other = folders[profiled.index(False)]
        raise ConfigError(
            f"one report of several folders is for profiles, and {str(other)!r} holds none; give it alone"
        )
    for folder, path in zip(folders, records, strict=True):
        if profiled[0] and not has_measurements(read_records(path)):
            raise ConfigError(
                f"{str(folder)!r} holds the beginning of a profile and no measurement; measure again, or leave it away"
            )
    out = folders[0] if out is None else out
    console = Console(stderr=True)
    if profiled[0]:
        page = write_profile_report(records, out)
        headline, html = page.headline, page.html
    else:
        paths = write_report(records[0], out)
        headline, html = paths.headline, paths.html
    console.print(headline, markup=False)
    console.print(f"report: {html}", markup=False, soft_wrap=True)
