"""`swinmoe upcycle`: a sparse model whose experts start as a dense model's MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from swinmoe.checkpoint.infer import habits
from swinmoe.checkpoint.load import load_pretrained
from swinmoe.checkpoint.manifest import MANIFEST
from swinmoe.checkpoint.reader import locate, open_checkpoint
from swinmoe.checkpoint.source import Which, read_source
from swinmoe.checkpoint.upcycle import Upcycling, upcycle
from swinmoe.checkpoint.upcycle_moments import upcycle_moments
from swinmoe.commands.saving import check_free, said_of, save_model
from swinmoe.config import RunConfig
from swinmoe.config.io import load, merge, parse_overrides, read_yaml
from swinmoe.errors import CheckpointError, ConfigError
from swinmoe.models import SwinTransformer, build_model
from swinmoe.randomness import generator

_IMAGES = 4


def run(
    source: Path,
    config: Path,
    out: Path,
    overrides: list[str],
    how: Upcycling,
    *,
    which: Which,
    carry_moments: bool,
    allow: Sequence[str],
) -> None:
    """Build the sparse model of `config`, fill it from `source`, measure how far it is from its parent, and save it.

    Raises:
        ConfigError: the config is dense, or no such model can start from the source.
        CheckpointError: the source does not fit, has no optimiser to carry, or `out` is in use.
    """
    check_free(out)
    resolved = load(RunConfig, config, overrides)
    cfg, seed = resolved.model, resolved.seed
    if cfg.moe is None:
        raise ConfigError(f"{str(config)!r} describes a dense model; set model.moe and model.moe_blocks")
    # Moments are of the weights themselves, not of their average.
    weights = read_source(source, allow, "model" if which == "auto" and carry_moments else which)
    given = merge(read_yaml(config).get("model") or {}, parse_overrides(overrides).get("model") or {})
    cfg = replace(cfg, **{key: value for key, value in habits(weights).items() if key not in given})
    dense = build_model(replace(cfg, moe=None), seed=seed, dtype=weights.dtype)
    found = load_pretrained(dense, weights, allow=allow)
    # The window that offsets are normalised by is the source's: `load_pretrained` finds it, and both models keep it.
    sparse = build_model(replace(dense.config, moe=cfg.moe), seed=seed, dtype=weights.dtype)
    report = upcycle(dense, sparse, how, source=str(source))
    moments = None
    if carry_moments:
        if found.resized or found.reinitialised:
            raise CheckpointError(
                f"weights of {str(source)!r} were resized or left out, and moments cannot be; use --moments reset"
            )
        moments = upcycle_moments(_moments_of(source), sparse, how)
    save_model(sparse, out, moments)
    console = Console(highlight=False)
    console.print(said_of(weights), markup=False, soft_wrap=True)
    console.print(found.summary(), markup=False, soft_wrap=True)
    console.print(report.summary(), markup=False, soft_wrap=True)
    console.print(_compare(dense, sparse), markup=False, soft_wrap=True)
    console.print(f"sparse model: {out}", markup=False, soft_wrap=True)


def _moments_of(source: Path) -> dict[str, Tensor]:
    place, arm = locate(source)
    stored = open_checkpoint(place) if (place / MANIFEST).is_file() else None
    if stored is None or f"{arm}optimizer" not in stored.groups:
        raise CheckpointError(f"{str(source)!r} holds no optimiser; give a run's checkpoint, or use --moments reset")
    return dict(stored.tensors(f"{arm}optimizer"))


@torch.no_grad()
def _compare(dense: SwinTransformer, sparse: SwinTransformer) -> str:
    """How far the child's outputs are from its parent's, on noise images, and how many choices it drops."""
    cfg = dense.config
    images = torch.randn(_IMAGES, cfg.in_chans, *cfg.img_size, generator=generator("upcycled against parent"))
    images = images.to(dense.norm.weight.dtype)
    before, after = dense.eval()(images).logits, sparse.eval()(images)
    far = float((before - after.logits).abs().max() / before.abs().max().clamp(min=torch.finfo(before.dtype).tiny))
    routed = sum(int(stats.routed.sum()) for stats in after.routing.values())
    dropped = routed - sum(int(stats.kept.sum()) for stats in after.routing.values())
    said = f"against the dense model, on {_IMAGES} images of noise: outputs differ by {far:.1e} of the largest"
    if dropped:
        said += (
            f"; {dropped} of {routed} choices were dropped (moe.capacity.eval), which is a difference by itself: with "
            "kind=dropless there are none"
        )
    return said
