"""A trained model, ready to be asked: for evaluation, features, predictions. Whole on every process, unless spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swinmoe.checkpoint.load_report import LoadReport
from swinmoe.config import RunConfig
from swinmoe.config.io import Tree, build, merge, parse_overrides, read_yaml, to_tree
from swinmoe.errors import ConfigError
from swinmoe.models import SwinOutput, SwinTransformer, build_model
from swinmoe.parallel import Mesh, apply_expert_parallel, make_mesh
from swinmoe.runtime import launched_world, make_accelerator
from swinmoe.train.pretrained import Pretrained, Which, complete_model, load_weights, open_pretrained

OF_TRAINING = ("name", "output_dir", "resume", "parallel", "checkpoint", "finetune")
"""Keys of a run that mean nothing to a model at rest, and stand at their defaults."""


@dataclass(frozen=True)
class Opened:
    """A model in evaluation mode with trained weights, and the run whose data it is asked about."""

    model: SwinTransformer
    run: RunConfig
    source: Pretrained
    report: LoadReport
    device: torch.device
    autocast: Callable[[], Any]
    mesh: Mesh = field(default_factory=Mesh)
    """Processes that share the asking; this one, if not told otherwise."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> SwinOutput:
        """Forward (b, C, H, W) images, which may be elsewhere and of another type; in the run's precision."""
        dtype = torch.float64 if self.run.train.precision == "fp64" else torch.float32
        with self.autocast():
            output: SwinOutput = self.model(images.to(self.device, dtype, non_blocking=True))
        return output


def open_model(
    path: Path | str,
    rest: Sequence[str] = (),
    which: Which = "auto",
    *,
    headless: bool = False,
    shared: bool = False,
    spread: bool = False,
) -> Opened:
    """The model of a checkpoint with its weights.

    Args:
        path: see `open_pretrained`.
        rest: a config file's path, which may be left out where the checkpoint holds its own, and `key=value` overrides.
            The file's `model` section is laid on top of the checkpoint's.
        which: weights or moving average.
        headless: leave the classifier out.
        shared: several processes may share what it is asked; each opens it.
        spread: so they may, and spread its experts as `parallel` says; each reads the checkpoint, and keeps its part.

    Raises:
        ConfigError: no configuration to be found, or one that does not fit; several processes where one must do; or
            experts that cannot be spread over them.
        CheckpointError: see `open_pretrained` and `load_pretrained`.
    """
    if launched_world() > 1 and not (shared or spread):
        raise ConfigError(
            f"this command runs on one process, and was started on {launched_world()}; start it without a launcher. Of "
            "those that take a trained model, evaluate, finetune and tune capacity run on several"
        )
    source = open_pretrained(path, which)
    spread = spread and launched_world() > 1
    run = run_at_rest(source, rest, parallel=spread)
    if headless:
        run = replace(run, model=replace(run.model, num_classes=0))
        named = {name: tensor for name, tensor in source.found.named.items() if not name.startswith("head.")}
        source = replace(source, found=replace(source.found, named=named))
    accelerator = make_accelerator(run.train.precision)
    dtype = torch.float64 if run.train.precision == "fp64" else torch.float32
    mesh = make_mesh(run.parallel, run.model.moe.num_experts if run.model.moe else None)
    # Spread on the host: a device has to have room for its part alone.
    device = torch.device("cpu") if spread else accelerator.device
    model = build_model(run.model, device=device, dtype=dtype).eval().requires_grad_(False)
    report = load_weights(model, source)
    if spread:
        apply_expert_parallel(model, mesh)
        model.to(accelerator.device)
        source = replace(source, found=replace(source.found, named={}))
    return Opened(model, run, source, report, accelerator.device, accelerator.autocast, mesh)


def run_at_rest(source: Pretrained, rest: Sequence[str], *, parallel: bool = False) -> RunConfig:
    """The run that a trained model is asked about; see `open_model`. `parallel`: with what it says of that."""
    files = [word for word in rest if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"{files} are several config files; give one, and key=value overrides")
    over = parse_overrides([word for word in rest if "=" in word])
    if files:
        base = read_yaml(files[0])
        given = merge(base.get("model") or {}, over.get("model") or {})
    elif source.run is not None:
        base = to_tree(source.run)
        given = dict(over.get("model") or {})
    elif over.get("data"):
        base, given = {}, dict(over.get("model") or {})
    else:
        raise ConfigError(
            f"{source.path!r} does not say what data it was trained on; give a CONFIG, or data.name=... at least"
        )
    said = (base if files else {}, over)
    tree = merge(base, over)
    size = _image_size(*said)
    if size is not None and "img_size" not in given:
        given["img_size"] = size
    tree["model"] = complete_model(given, source)
    left_out = [key for key in OF_TRAINING if key != "parallel" or not parallel]
    return build(RunConfig, {key: value for key, value in tree.items() if key not in left_out})


def _image_size(*trees: Tree) -> Any:
    """`data.image_size` of the last tree that has it."""
    found = [tree["data"]["image_size"] for tree in trees if "image_size" in (tree.get("data") or {})]
    return found[-1] if found else None
