"""Files that commands write at the end of long work."""

from __future__ import annotations

from pathlib import Path

from swinmoe.errors import ConfigError


def refusal(option: str, out: Path) -> ConfigError | None:
    """Why the file could not be written, to be asked before the work, not after it; None if it could.

    Args:
        option: of the command line, as `--out`.
        out: the file; one that is there is written over.
    """
    if not out.parent.is_dir():
        return ConfigError(f"{option} {out}: the folder {str(out.parent)!r} does not exist; make it first")
    return ConfigError(f"{option} {out} is a folder; give a file") if out.is_dir() else None


def check_out(option: str, out: Path) -> None:
    """`ConfigError` if there is a `refusal`."""
    refused = refusal(option, out)
    if refused is not None:
        raise refused
