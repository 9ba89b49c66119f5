"""The weight files that Microsoft and the authors have published, known without a network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml
from pydantic import TypeAdapter


@dataclass(frozen=True)
class Released:
    """One published file. What no list states is None."""

    name: str
    family: str
    """`swin-v1`, `swin-v2`, `swin-moe`, `simmim-v1` or `simmim-v2`."""
    file: str | None
    url: str
    size: int | None
    """Bytes."""
    sha256: str | None
    preset: str | None
    """What `swinmoe convert --preset` must be given; None: the file's shapes tell."""
    overrides: tuple[str, ...]
    """Settings on top of the preset."""
    allow: tuple[str, ...]
    """What the file has besides the model, to be allowed by name."""

    def command(self) -> str:
        """How to convert it."""
        words = ["swinmoe convert", self.file or "FILE", "DST"]
        words += [f"--preset {self.preset}"] if self.preset else []
        words += [f"--allow '{pattern}'" for pattern in self.allow]
        return " ".join([*words, *self.overrides])


@cache
def released() -> tuple[Released, ...]:
    """All of them, in the order of the lists they are from (`released.yaml` names these)."""
    text = files("swinmoe.checkpoint").joinpath("released.yaml").read_text(encoding="utf-8")
    return TypeAdapter(tuple[Released, ...]).validate_python(yaml.safe_load(text))
