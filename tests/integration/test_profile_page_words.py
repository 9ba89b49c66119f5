"""Commands of the profiling page are commands that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from swinmoe.cli import app

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "howto" / "profile.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_understood(line: str) -> None:
    """Parsed as the command line would, and not run."""
    words = shlex.split(line)
    if words[0] == "launch/local.sh":
        assert words[1] == "--processes" and words[2].isdecimal()
        words = words[3:]
    else:
        assert words.pop(0) == "swinmoe"
    command, name = typer.main.get_command(app), "swinmoe"
    while hasattr(command, "commands"):
        name = words.pop(0)
        command = command.commands[name]
    assert command.make_context(name, list(words)).args == []


def test_options_that_it_speaks_of_exist() -> None:
    said = set(re.findall(r"`(--[a-z-]+)", TEXT))
    groups = typer.main.get_command(app).commands["profile"].commands  # type: ignore[attr-defined]
    known = {option for command in groups.values() for p in command.params for option in (*p.opts, *p.secondary_opts)}
    assert said <= known, said - known
