"""Trained weights in hand: what a checkpoint holds, what model it says it is, and a model with them inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from swinmoe.checkpoint import model_config, open_checkpoint, read_model
from swinmoe.checkpoint.infer import habits, infer_config
from swinmoe.checkpoint.load import load_pretrained, source_references
from swinmoe.checkpoint.load_report import LoadReport
from swinmoe.checkpoint.manifest import MANIFEST
from swinmoe.checkpoint.reader import locate
from swinmoe.checkpoint.source import Source, read_source
from swinmoe.checkpoint.upcycle import Upcycling, upcycle
from swinmoe.config import ModelConfig, RunConfig, UpcycleConfig
from swinmoe.config.io import Tree, build, merge, read_yaml, to_tree
from swinmoe.errors import CheckpointError, ConfigError
from swinmoe.models import SwinTransformer, build_model

Which = Literal["auto", "model", "average"]


@dataclass(frozen=True)
class Pretrained:
    """Weights, read, and where they are from."""

    path: str
    found: Source
    weights: Literal["model", "average"]
    """Which of a checkpoint's they are."""
    run: RunConfig | None
    """The run that they were trained in, where the checkpoint says so."""

    @property
    def sparse(self) -> bool:
        """True if there are expert layers."""
        return any(".router." in name for name in self.found.named)

    def config(self) -> ModelConfig:
        """The model that they belong to: as they say, or as their shapes tell.

        Raises:
            CheckpointError: neither does.
        """
        return self.found.config or infer_config(self.found)


def open_pretrained(path: Path | str, which: Which = "auto", allow: Sequence[str] = ()) -> Pretrained:
    """Read trained weights of any known kind (`swinmoe.checkpoint.source`).

    Args:
        path: a run's folder, a checkpoint, a saved model, or another project's file or files.
        which: of a checkpoint of ours the weights or their moving average; `auto` = the average where there is one.
        allow: names in which the files of several ranks may differ.

    Raises:
        CheckpointError: nothing there, damaged, of no known kind; or no average though one is asked for.
    """
    path = str(path)
    place, arm = locate(path) if Path(path).exists() else (Path(path), "")
    stored = open_checkpoint(place) if place.is_dir() and (place / MANIFEST).is_file() else None
    averaged = stored is not None and f"{arm}average" in stored.groups
    weights: Literal["model", "average"] = (
        "average" if which == "average" or (which == "auto" and averaged) else "model"
    )
    if stored is None:
        if which == "average":
            raise CheckpointError(f"{path!r} is no checkpoint of a run, so it holds no moving average; use 'auto'")
        return Pretrained(path, read_source(path, allow), weights, None)
    tensors = dict(read_model(place / arm, weights))
    said = f"{path} (moving average)" if weights == "average" else path
    found = replace(read_source(tensors), label=said, config=model_config(place / arm))
    run = f"{arm}config.yaml" in stored.manifest.files
    return Pretrained(path, found, weights, build(RunConfig, read_yaml(place / arm / "config.yaml")) if run else None)


def complete_model(given: Tree, source: Pretrained) -> Tree:
    """The keys of a model that is to hold `source`: those given, on top of the source's own.

    A named preset stands for itself, but for what the source's code does and no preset says (`habits`). Offsets of
    log-spaced position biases stay normalised by the source's windows, as they must for the function to stay what it
    was, whatever the new window.
    """
    if given.get("preset", "custom") != "custom":
        tree = merge(habits(source.found), given)
    else:
        tree = merge(to_tree(source.config()), given)
    if "pretrained_window_sizes" not in given:
        windows = source_references(source.found, build(ModelConfig, tree))
        tree["pretrained_window_sizes"] = None if windows is None else [list(window) for window in windows]
    return tree


def without_head(source: Pretrained) -> Pretrained:
    """The same weights without their classifier."""
    kept = {name: tensor for name, tensor in source.found.named.items() if not name.startswith("head.")}
    return replace(source, found=replace(source.found, named=kept))


def load_weights(
    model: SwinTransformer,
    source: Pretrained,
    *,
    allow: Sequence[str] = (),
    class_map: str | None = None,
    how: UpcycleConfig | None = None,
) -> LoadReport:
    """Bring `source` into `model`, resized where it must be; dense weights into a sparse model by upcycling.

    Raises:
        ConfigError: a dense source for a sparse model, and nothing is said about upcycling.
        CheckpointError: see `load_pretrained` and `upcycle`. The model is left alone then.
    """
    if not model.moe_layers() or source.sparse:
        return load_pretrained(model, source.found, allow=allow, class_map=class_map)
    if how is None:
        raise ConfigError(
            f"{source.found.label} is dense and the model has experts; set finetune.upcycle={{}} to let them start as "
            "copies of its MLPs, or model.moe=null for a dense model"
        )
    # By way of the dense twin, which takes care of windows, channels and classes.
    twin = build_model(replace(model.config, moe=None, moe_blocks=()), seed=model.seed, dtype=model.norm.weight.dtype)
    first = load_pretrained(twin, source.found, allow=allow, class_map=class_map)
    options = Upcycling(**to_tree(how))
    second = upcycle(twin, model, options, source=source.found.label, allow=allow)
    kept = {**first.reinitialised, **second.reinitialised}
    changed = {name: how for name, how in first.resized.items() if name in second.loaded}
    loaded = [name for name in second.loaded if name not in changed and name not in kept and name not in first.missing]
    return LoadReport(source.found.label, tuple(loaded), changed, kept, first.unused, first.missing)
