"""What pages are made of: pictures for light and dark, templates, files that appear whole or not at all."""

from __future__ import annotations

import base64
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from swinmoe.report import wording
from swinmoe.report.theme import DARK, LIGHT, Theme, styled, to_png


@dataclass(frozen=True)
class Picture:
    """A figure of the report, drawn for light pages (also a file) and for dark ones (in the HTML only)."""

    file: str
    """Relative to the report."""
    title: str
    light: bytes
    dark: bytes

    @property
    def light_uri(self) -> str:
        return _uri(self.light)

    @property
    def dark_uri(self) -> str:
        return _uri(self.dark)


Draw = Callable[[Theme], bytes]


def drawn(make: Callable[[Theme], Figure], theme: Theme) -> bytes:
    """A PNG of what `make` draws, in a theme."""
    with styled(theme):
        return to_png(make(theme))


def add_picture(pictures: list[Picture], name: str, title: str, draw: Draw) -> Picture:
    """Draw for both themes under a file name that is safe and not yet taken."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "figure"
    taken = {picture.file for picture in pictures}
    candidates = [stem, *(f"{stem}-{i}" for i in range(2, len(taken) + 3))]
    file = next(path for path in (f"figures/{c}.png" for c in candidates) if path not in taken)
    picture = Picture(file, title, draw(LIGHT), draw(DARK))
    pictures.append(picture)
    return picture


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as dotted names with their values, in order."""
    out: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out += flat(value, f"{name}.")
        else:
            out.append((name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return out


def as_yaml(config: Any) -> str:
    """A configuration as text; empty for none."""
    return yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=110) if config else ""


def templates(*, autoescape: bool) -> Environment:
    """The package's templates and the filters that they use; a name that is not there is an error."""
    env = Environment(
        loader=PackageLoader("swinmoe.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for name in ("scaled", "ratio", "number", "signed", "spread", "duration"):
        env.filters[name] = getattr(wording, name)
    env.filters |= {"cell": _cell, "fenced": _fenced, "estimate_html": _estimate_html}
    return env


def _estimate_html(text: str) -> Markup:
    """The ± part of an estimate set small."""
    mean, sign, half = text.partition(" ± ")
    return escape(mean) + Markup(" <small>± {}</small>").format(half) if sign else escape(mean)


def _cell(text: object) -> str:
    """`text` inside Markdown: no table borders, no HTML, no line breaks, no emphasis."""
    escaped = re.sub(r"([\\`*_|\[\]])", r"\\\1", " ".join(str(text).split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _fenced(text: str, language: str = "") -> str:
    """`text` as a code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def write_whole(path: Path, data: bytes) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
