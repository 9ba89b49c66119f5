"""`swinmoe fewshot`: how good frozen features are, without training."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from swinmoe.commands.telling import telling
from swinmoe.data import build_data
from swinmoe.errors import ConfigError
from swinmoe.report import estimate
from swinmoe.train.evaluate_model import Choices, independence
from swinmoe.train.features import features_of
from swinmoe.train.fewshot import STRENGTHS, draw_shots, nearest_neighbours, probe
from swinmoe.train.opened import open_model
from swinmoe.train.pretrained import Which


def run(
    checkpoint: Path,
    rest: list[str],
    *,
    which: Which,
    shots: int,
    draws: int,
    strength: float | None,
    neighbours: int | None,
    out: Path | None,
) -> None:
    """Probe `checkpoint`'s features: with `shots` images a class, `draws` times; or `neighbours` of the training set.

    Raises:
        ConfigError: numbers below 1.
        SwinMoEError: see `open_model` and `draw_shots`.
    """
    if min(shots, draws, 1 if neighbours is None else neighbours) < 1 or (strength is not None and strength <= 0):
        raise ConfigError(f"--shots {shots}, --draws {draws}, --knn {neighbours} and --l2 {strength} must be above 0")
    opened = open_model(checkpoint, rest, which, headless=True)
    bundle = build_data(opened.run.data, seed=opened.run.seed)
    size = opened.run.train.eval_batch_size
    wanted: list[list[int]] = []
    if neighbours is None:
        wanted = [draw_shots(bundle.train.targets, bundle.num_classes, shots, draw) for draw in range(draws)]
        needed = sorted({index for draw in wanted for index in draw})
    else:
        needed = list(range(len(bundle.train)))
    choices = Choices()
    with telling("features of training images") as tell:
        bank, classes = features_of(opened, bundle.train, needed, size, tell, choices)
    with telling("features of test images") as tell:
        queries, targets = features_of(opened, bundle.eval, range(len(bundle.eval)), size, tell, choices)
    batches = independence(opened.model, choices, size)
    result: dict[str, Any] = {
        "checkpoint": opened.source.path,
        "weights": opened.source.weights,
        "data": {"name": opened.run.data.name, "split": bundle.eval_split, "images": len(targets)},
        "features": bank.shape[1],
        "batches": asdict(batches),
    }
    if neighbours is not None:
        guess = nearest_neighbours(bank, classes, queries, bundle.num_classes, neighbours)
        result |= {"neighbours": neighbours, "of": len(bank), "accuracy": _accuracy(guess, targets)}
        said = f"{neighbours} nearest of {len(bank):,} training images: accuracy {100 * result['accuracy']:.2f} %"
    else:
        result |= _probe(wanted, needed, bank, classes, queries, targets, bundle.num_classes, strength)
        half = "" if result["half_width"] is None else f" ± {100 * result['half_width']:.2f}"
        said = f"{shots} shots a class, {draws} draws: accuracy {100 * result['accuracy']:.2f}{half} %"
        said += " (mean ± 95 % t interval over draws)" if half else ""
        result["shots"] = shots
    console = Console(highlight=False)
    console.print(f"{checkpoint} on {result['data']['name']}: {said}", markup=False, soft_wrap=True)
    if not batches.independent:
        console.print(batches.said, markup=False, soft_wrap=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _probe(
    wanted: list[list[int]],
    needed: list[int],
    bank: Tensor,
    classes: Tensor,
    queries: Tensor,
    targets: Tensor,
    num_classes: int,
    strength: float | None,
) -> dict[str, Any]:
    row = {index: place for place, index in enumerate(needed)}
    accuracies, strengths = [], []
    for draw in wanted:
        rows = torch.tensor([row[index] for index in draw])
        tried = STRENGTHS if strength is None else (strength,)
        guess, used = probe(bank[rows], classes[rows], queries, num_classes, tried)
        accuracies.append(_accuracy(guess, targets))
        strengths.append(used)
    mean = estimate(accuracies)
    assert mean is not None
    return {"accuracy": mean.mean, "half_width": mean.half_width, "accuracies": accuracies, "l2": strengths}


def _accuracy(guess: Tensor, targets: Tensor) -> float:
    return float((guess == targets).double().mean())
