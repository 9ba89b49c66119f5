"""`swinmoe look`: which expert took which patch of a picture, layer by layer."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from swinmoe.data.pictures import find_pictures, preparation
from swinmoe.errors import ConfigError
from swinmoe.models.stage import stage_map
from swinmoe.report.patches import Sample, patch_sheet
from swinmoe.report.theme import DARK, LIGHT
from swinmoe.train.opened import open_model
from swinmoe.train.pretrained import Which

MOST = 96
"""Pictures on one sheet."""


def run(checkpoint: Path, images: list[Path], overrides: list[str], *, which: Which, out: Path, dark: bool) -> None:
    """Write a PNG: the pictures in `images` across, below each its patches coloured by the expert of first choice.

    Raises:
        ConfigError: a dense model, or more pictures than a sheet holds.
        SwinMoEError: see `open_model` and `find_pictures`.
    """
    paths = find_pictures(images)
    if len(paths) > MOST:
        raise ConfigError(f"{len(paths)} pictures do not fit on one sheet; give at most {MOST}")
    opened = open_model(checkpoint, overrides, which)
    moe = opened.run.model.moe
    if moe is None:
        raise ConfigError(f"{str(checkpoint)!r} holds a dense model: it has no experts to colour patches by")
    prepare = preparation(opened.run.data)
    pictures = [prepare.picture(path) for path in paths]
    output = opened(prepare.tensor(pictures))
    grids = {}
    for name, stats in output.routing.items():
        height, width = stage_map(opened.model.config, int(name.split(".")[1]))
        grids[name] = stats.expert_ids[:, 0].view(len(paths), height, width).cpu().numpy()
    guesses = output.logits.argmax(-1).tolist() if opened.run.model.num_classes else [None] * len(paths)
    shown = [
        Sample(
            picture.convert("RGB"),
            path.stem if guess is None else prepare.name(guess),
            None,
            {name: grid[row] for name, grid in grids.items()},
        )
        for row, (path, picture, guess) in enumerate(zip(paths, pictures, guesses, strict=True))
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(patch_sheet(shown, moe.num_experts, DARK if dark else LIGHT))
    console = Console(stderr=True, highlight=False)
    dropped = sum(int((grid < 0).sum()) for grid in grids.values())
    console.print(
        f"{out}: {len(paths)} pictures, {len(grids)} expert layers, {dropped} patches dropped",
        markup=False,
        soft_wrap=True,
    )
