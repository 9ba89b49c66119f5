"""Experts in anybody's model: its MLPs become expert layers that start as cuts of them.

Shapes: T tokens, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from swinmoe.checkpoint.mlp_reader import ReadMlp, looks_like_mlp, read_mlp
from swinmoe.checkpoint.upcycle import Upcycling, check_parent, fill_layer
from swinmoe.config.moe import MoEConfig
from swinmoe.errors import ConfigError, RoutingError
from swinmoe.models import SwinTransformer
from swinmoe.moe import MoEMlp, RoutingStats, merge


class SparseMlp(nn.Module):
    """An expert layer where a model expects an MLP: it returns its output alone; see `collect_routing` for the rest.

    Args:
        moe: the experts.
        dropout: of the output, as the MLP had it after its second matrix.
    """

    def __init__(self, moe: MoEMlp, dropout: float = 0.0) -> None:
        super().__init__()
        self.moe = moe
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(*, D) -> (*, D)."""
        # Gate noise from the global generator: what recomputes activations replays that one, and not the layer's own.
        noise, cfg = None, self.moe.cfg
        if self.training and cfg.router.noise > 0:
            noise = torch.randn(x.shape[:-1].numel(), cfg.num_experts, device=x.device)
            noise = noise * (cfg.router.noise / cfg.num_experts)
        y: Tensor = self.drop(self.moe(x, noise)[0])
        return y


def sparsify(
    model: nn.Module,
    blocks: str | Sequence[str],
    cfg: MoEConfig | None = None,
    how: Upcycling | None = None,
    *,
    init_std: float = 0.02,
    seed: int = 0,
) -> nn.Module:
    """Replace MLPs of any model by expert layers, in place; with the defaults its function stays what it was.

    timm's, torchvision's and other models: an MLP is any module that computes fc2(act(fc1 x)), or a gated one, with an
    activation that registered experts have (found out by calling it). Experts get `cfg.experts.dropout`, or the MLP's
    own dropout where that is 0; dropout after fc2 stays.

        model = timm.create_model("vit_tiny_patch16_224", pretrained=True)
        swinmoe.sparsify(model, ["blocks.9", "blocks.11"], swinmoe.MoEConfig(num_experts=8))
        with swinmoe.collect_routing(model) as routing:
            loss = criterion(model(images), targets)
        (loss + routing.loss).backward()

    Args:
        model: changed in place, before it is wrapped, compiled, or given to an optimiser.
        blocks: names of MLPs, or of modules around them (all MLPs inside are taken); `*`, `?` and `[...]` stand for
            parts of names, e.g. `layers.[23].blocks.*`.
        cfg: the expert layer; None = `MoEConfig()`.
        how: copy, noise, drop, cut; None = `Upcycling()`.
        init_std: standard deviation of the router's initial matrices.
        seed: of the router's initial values; those depend on (seed, module name) only.

    Returns:
        `model` itself.

    Raises:
        ConfigError: a name that fits no MLP, an MLP that experts cannot compute, or a config that cannot preserve the
            function (`upcycle_plan`). Nothing has been changed then.
    """
    if isinstance(model, SwinTransformer):
        raise ConfigError(
            "sparsify is for models from elsewhere; for a SwinTransformer build the sparse model and use "
            "swinmoe.upcycle(dense, sparse), so that its config says what it is"
        )
    cfg, how = cfg or MoEConfig(), how or Upcycling()
    made: dict[nn.Module, SparseMlp] = {}
    for name, mlp in _chosen(model, [blocks] if isinstance(blocks, str) else blocks).items():
        made[mlp] = _make(name, mlp, read_mlp(mlp, name), cfg, how, init_std, seed)
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if child in made:
                setattr(parent, key, made[child])
    return model


def _chosen(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """MLPs by name whose own name, or that of a module around them, fits a pattern."""
    mlps = {name: module for name, module in model.named_modules() if name and looks_like_mlp(module)}
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        fitting = [n for n in mlps if any(fnmatchcase(part, pattern) for part in _ancestry(n))]
        if not fitting:
            known = ", ".join(list(mlps)[:8]) + (f" and {len(mlps) - 8} more" if len(mlps) > 8 else "")
            raise ConfigError(
                f"no MLP of this {type(model).__name__} is named {pattern!r}, and none lies in a module of that name; "
                f"its MLPs are {known or 'none (an MLP has two or three linear layers and no other parameters)'}"
            )
        chosen |= {name: mlps[name] for name in fitting}
    if not chosen:
        raise ConfigError("sparsify was given no names; name the MLPs to replace, e.g. ['blocks.9', 'blocks.11']")
    return chosen


def _ancestry(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))


def _make(
    name: str, mlp: nn.Module, found: ReadMlp, cfg: MoEConfig, how: Upcycling, init_std: float, seed: int
) -> SparseMlp:
    if cfg.experts.type != found.kind:
        raise ConfigError(
            f"{name!r} computes what experts of type {found.kind!r} do, and moe.experts.type={cfg.experts.type!r}; set "
            f"that to {found.kind!r}"
        )
    if cfg.experts.dropout == 0:
        cfg = replace(cfg, experts=replace(cfg.experts, dropout=found.inner_dropout))
    weight = found.weights.fc2
    layer = MoEMlp(
        cfg,
        dim=found.dim,
        hidden_dim=found.weights.hidden,
        name=name,
        seed=seed,
        init_std=init_std,
        device=weight.device,
        dtype=weight.dtype,
    )
    fill_layer(layer, found.weights, check_parent(layer, found.weights, how, name), how)
    return SparseMlp(layer, found.outer_dropout).train(mlp.training)


@dataclass
class CollectedRouting:
    """What the expert layers of a model have reported."""

    layers: dict[str, RoutingStats] = field(default_factory=dict)
    """By the layer's name in its model; of several passes, taken together."""
    mean: bool = False
    """The loss is the mean over layers and not their sum (`moe.losses.over_layers`)."""

    @property
    def loss(self) -> Tensor:
        """() the layers' weighted auxiliary losses, differentiable: add it to the model's own.

        Raises:
            RoutingError: no expert layer has run.
        """
        if not self.layers:
            raise RoutingError(
                "no expert layer has run inside `collect_routing`: call the model there, and if it is compiled, "
                "compile it there too (hooks that come later are not seen)"
            )
        losses = torch.stack([stats.loss for stats in self.layers.values()])
        return losses.mean() if self.mean else losses.sum()


@contextmanager
def collect_routing(model: nn.Module) -> Iterator[CollectedRouting]:
    """While inside, gather what every expert layer of `model` reports: `routing.loss`, and `routing.layers` by name.

    Works through wrappers such as DDP. Leave it before the backward pass, so that recomputed activations are not
    counted twice; activation checkpointing must be of the non-reentrant kind.

    Raises:
        ConfigError: the model has no expert layer.
    """
    found = [layer for layer in model.modules() if isinstance(layer, MoEMlp)]
    if not found:
        raise ConfigError(f"this {type(model).__name__} has no expert layer to collect from; sparsify it first")
    collected = CollectedRouting(mean=found[0].cfg.losses.over_layers == "mean")

    def note(layer: nn.Module, _: object, output: tuple[Tensor, RoutingStats]) -> None:
        assert isinstance(layer, MoEMlp)
        before = collected.layers.get(layer.name)
        collected.layers[layer.name] = output[1] if before is None else merge(before, output[1])

    handles = [layer.register_forward_hook(note) for layer in found]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()
