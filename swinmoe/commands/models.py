"""`swinmoe models`: the named models with what they cost."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from swinmoe.config import ModelConfig
from swinmoe.config.io import build
from swinmoe.config.presets import PRESETS
from swinmoe.errors import ConfigError, did_you_mean
from swinmoe.models.counts import count


def run(contains: str) -> None:
    """Print name, parameters and forward FLOPs per image of every preset whose name contains `contains`.

    Raises:
        ConfigError: no name does.
    """
    names = [name for name in sorted(PRESETS) if contains in name]
    if not names:
        hint = did_you_mean(contains, PRESETS) or "; `swinmoe models` lists them all"
        raise ConfigError(f"no named model contains {contains!r}{hint}")
    table = Table("preset", "image", "parameters M", "active M", "GFLOPs / image")
    for name in names:
        config = build(ModelConfig, {"preset": name})
        found = count(config)
        size = f"{config.img_size[0]} x {config.img_size[1]}"
        table.add_row(name, size, f"{found.total / 1e6:.2f}", f"{found.active / 1e6:.2f}", f"{found.flops / 1e9:.3f}")
    Console().print(table)
