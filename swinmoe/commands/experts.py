"""`swinmoe experts`: a trained model with more experts, fewer, others, or merged into a dense one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from swinmoe.checkpoint.experts_edit import grow_experts, keep_experts, most_chosen, prune_experts
from swinmoe.checkpoint.experts_merge import merge_experts
from swinmoe.checkpoint.load import load_pretrained
from swinmoe.checkpoint.reader import locate, model_config
from swinmoe.checkpoint.source import Which, read_source
from swinmoe.checkpoint.usage import ExpertUsage, measure_usage
from swinmoe.commands.saving import check_free, said_of, save_model
from swinmoe.config import ParallelConfig, RunConfig
from swinmoe.config.io import build, load, read_yaml
from swinmoe.data import DataBundle, ImageDataset, build_data, eval_batches
from swinmoe.errors import ConfigError
from swinmoe.models import SwinTransformer, build_model
from swinmoe.models.counts import count
from swinmoe.parallel import make_mesh
from swinmoe.runtime import make_accelerator
from swinmoe.train import Length, evaluate, make_arm
from swinmoe.train.session import check_data_fits

Usage = dict[str, ExpertUsage]

_NO_END = 10**12
"""Steps of a run that is only evaluated: longer than any warm-up that its config may name."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What is asked for: exactly one of the first four."""

    grow: int | None = None
    keep: tuple[int, ...] | None = None
    prune: int | None = None
    merge: str | None = None
    noise: float = 0.0
    """`grow`: on the copies."""
    preserve: bool = True
    """`grow`: refuse what changes the function."""

    def __post_init__(self) -> None:
        asked = [name for name in ("grow", "keep", "prune", "merge") if getattr(self, name) is not None]
        if len(asked) != 1:
            raise ConfigError(f"give one of --grow, --keep, --prune and --merge; given: {asked or 'none'}")
        if self.merge not in (None, "average", "usage"):
            raise ConfigError(f"--merge {self.merge}: use average or usage")

    def apply(self, model: SwinTransformer, usage: Usage | None) -> SwinTransformer:
        """The edited model."""
        if self.grow is not None:
            return grow_experts(model, self.grow, usage, noise=self.noise, preserve=self.preserve)
        if self.keep is not None:
            return keep_experts(model, self.keep)
        if self.merge is not None:
            return merge_experts(model, "usage" if self.merge == "usage" else "average", usage)
        if usage is None or self.prune is None:
            raise ConfigError("--prune goes by the load that data puts on experts; give --data CONFIG")
        return prune_experts(model, self.prune, usage)


def parse_ids(text: str) -> tuple[int, ...]:
    """`0,3,5` -> (0, 3, 5); `ConfigError` for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--keep {text}: give numbers of experts with commas between, e.g. 0,3,5") from error


def run(source: Path, out: Path, edit: Edit, *, data: Path | None, images: int, which: Which) -> None:
    """Edit the model in `source`, evaluate it before and after where there is data, and save it.

    Raises:
        SwinMoEError: see `keep_experts`, `grow_experts`, `merge_experts` and `build_data`; nothing is written then.
    """
    check_free(out)
    weights = read_source(source, which=which)
    model = build_model(weights.config or model_config(source), dtype=weights.dtype)
    load_pretrained(model, weights)
    run_config = _run_of(source, data)
    bundle = None if run_config is None else build_data(run_config.data, seed=run_config.seed)
    usage = None if bundle is None or run_config is None else _usage(model, bundle, run_config, images)
    edited = edit.apply(model, usage)
    table = Table("", "experts", "top-k", "parameters M", "accuracy", "loss")
    scored = _scorer(run_config, bundle)
    for label, it in (("before", model), ("after", edited)):
        table.add_row(label, *_row(it, scored))
    save_model(edited, out)
    console = Console(highlight=False)
    console.print(table)
    if usage is not None:
        console.print(_usage_table(usage))
        if edit.prune is not None:
            for layer, ids in most_chosen(model, edit.prune, usage).items():
                console.print(f"{layer}: kept {', '.join(map(str, ids))}", markup=False, soft_wrap=True)
    if bundle is not None:
        console.print(
            f"accuracy on {len(bundle.eval)} images ({bundle.eval_split}), load on at most {images} of training"
        )
    console.print(f"{said_of(weights)} -> {out}", markup=False, soft_wrap=True)


def _run_of(source: Path, data: Path | None) -> RunConfig | None:
    """The run whose data and batch sizes are used: of --data, or the checkpoint's own, where it says so. How it was
    fine-tuned says nothing about the data."""
    if data is not None:
        return replace(load(RunConfig, data, []), finetune=None)
    place, arm = locate(source)
    own = (place if place.is_dir() else place.parent) / arm / "config.yaml"
    return replace(build(RunConfig, read_yaml(own)), finetune=None) if own.is_file() else None


@torch.no_grad()
def _usage(model: SwinTransformer, bundle: DataBundle, run: RunConfig, images: int) -> Usage:
    """Load on training images without augmentation: what is chosen by it must not have seen the test images."""
    _check_fits(model, bundle, run)
    model.eval()
    seen = 0
    with measure_usage(model) as usage:
        for batch in _batches(bundle.train, run):
            model(batch.images[: images - seen].to(model.norm.weight.dtype))
            seen += len(batch.images)
            if seen >= images:
                break
    return usage


def _batches(dataset: ImageDataset, run: RunConfig) -> Any:
    return eval_batches(dataset, batch_size=run.train.eval_batch_size, rank=0, world=1)


def _check_fits(model: SwinTransformer, bundle: DataBundle, run: RunConfig) -> None:
    check_data_fits(replace(run, model=model.config), bundle)


def _scorer(run: RunConfig | None, bundle: DataBundle | None) -> Callable[[SwinTransformer], tuple[str, str]]:
    """Accuracy and loss of a model on the evaluation images, in words; dashes without data."""
    if run is None or bundle is None:
        return lambda _: ("-", "-")
    accelerator = make_accelerator(run.train.precision)
    mesh = make_mesh(ParallelConfig(), None)

    def score(model: SwinTransformer) -> tuple[str, str]:
        train = replace(run.train, ema_decay=None)
        arm = make_arm(
            "model",
            replace(run, model=model.config, parallel=ParallelConfig(), train=train),
            mesh,
            accelerator,
            Length(steps=_NO_END),
            1,
        )
        arm.raw.load_state_dict(model.state_dict())
        found = evaluate(arm, bundle.eval, run.train.eval_batch_size)
        accelerator.free_memory()
        return f"{100 * found['accuracy']:.2f} %", f"{found['loss']:.4f}"

    return score


def _row(model: SwinTransformer, score: Callable[[SwinTransformer], tuple[str, str]]) -> tuple[str, ...]:
    moe = model.config.moe
    experts = ("dense", "-") if moe is None else (str(moe.num_experts), str(moe.top_k))
    return (*experts, f"{count(model.config).total / 1e6:.2f}", *score(model))


def _usage_table(usage: Usage) -> Table:
    table = Table("layer", "share of choices by expert, %")
    for name, found in usage.items():
        share = 100 * found.chosen / found.chosen.sum()
        table.add_row(name, " ".join(f"{value:.0f}" for value in share.tolist()))
    return table
