"""`swinmoe predict`: what a trained model takes pictures for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from swinmoe.commands.telling import telling
from swinmoe.data.pictures import find_pictures, preparation
from swinmoe.train.evaluate_model import Choices, independence
from swinmoe.train.evaluate_scores import BEST
from swinmoe.train.opened import open_model
from swinmoe.train.pretrained import Which


def run(checkpoint: Path, images: list[Path], overrides: list[str], *, which: Which, as_json: bool) -> None:
    """Print the most likely classes of every picture in `images` (files and folders), as a table or as JSON; beside it,
    if so, that they depend on the other pictures.

    Raises:
        DataError: no pictures, or damaged ones.
        SwinMoEError: see `open_model`.
    """
    paths = find_pictures(images)
    opened = open_model(checkpoint, overrides, which)
    prepare = preparation(opened.run.data)
    size = opened.run.train.eval_batch_size
    found: list[dict[str, Any]] = []
    choices = Choices()
    with telling("looking") as tell:
        for start in range(0, len(paths), size):
            part = paths[start : start + size]
            output = opened(prepare.tensor([prepare.picture(path) for path in part]))
            choices.add(output.routing)
            logits = output.logits
            top = logits.double().softmax(-1).topk(min(BEST, logits.shape[1]), dim=-1)
            for path, values, classes in zip(part, top.values.tolist(), top.indices.tolist(), strict=True):
                best = [
                    {"class": index, "name": prepare.name(index), "probability": value}
                    for index, value in zip(classes, values, strict=True)
                ]
                found.append({"image": str(path), "best": best})
            tell(len(found), len(paths))
    batches = independence(opened.model, choices, size)
    if not batches.independent:
        Console(stderr=True, highlight=False).print(batches.said, markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table()
    for heading in ("image", "most likely", "next"):
        table.add_column(heading, overflow="fold")  # a path cut short names no file
    for item in found:
        first, *rest = (f"{b['name']} {100 * b['probability']:.1f} %" for b in item["best"])
        table.add_row(item["image"], first, ", ".join(rest))
    Console(highlight=False).print(table)
