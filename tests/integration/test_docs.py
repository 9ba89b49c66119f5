"""The Python in the documents runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from swinmoe.cli import app
from swinmoe.moe.registry import DISPATCHERS, EXPERTS, ROUTERS

ROOT = Path(__file__).parents[2]
PAGES = [
    path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if "```python" in path.read_text()
]


def test_there_are_pages_with_code() -> None:
    assert len(PAGES) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page run one after the other in one namespace; what they register is forgotten afterwards."""
    for registry in (ROUTERS, EXPERTS, DISPATCHERS):
        monkeypatch.setattr(registry, "_parts", dict(registry._parts))
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)


def _commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every `swinmoe ...` line in a shell block."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(), flags=re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [
                (page.name, shlex.split(line, comments=True)[1:]) for line in lines if line.startswith("swinmoe ")
            ]
    return found


def test_command_lines_are_understood() -> None:
    """Commands and options exist, and take such values; nothing is run."""
    group, lines = typer.main.get_command(app), _commands()
    assert len(lines) > 30
    for page, words in lines:
        command, rest = group, list(words)
        while isinstance(command, click.Group):
            assert rest and rest[0] in command.commands, f"{page}: swinmoe {' '.join(words)}"
            command = command.commands[rest.pop(0)]
        try:
            command.make_context(words[0], rest)
        except click.UsageError as error:
            raise AssertionError(f"{page}: swinmoe {' '.join(words)}: {error.message}") from error


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "launch" / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} -> {target}"


def test_configs_that_documents_name_exist() -> None:
    for page in [ROOT / "README.md", ROOT / "launch" / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for name in re.findall(r"configs/[\w/]+\.yaml", page.read_text()):
            assert (ROOT / name).is_file(), f"{page.name} names {name}"
    for config in (ROOT / "configs").rglob("*.yaml"):
        command = r"(?:train|finetune|compare|layer|model|exchange) (configs/[\w/]+\.yaml)"
        named = re.findall(command, config.read_text())
        assert str(config.relative_to(ROOT)) in named, f"the header of {config.name} does not say its own command"
