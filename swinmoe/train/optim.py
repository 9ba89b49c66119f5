"""AdamW with the no-decay set of the Swin family, the linear scaling of its rates, and rates by layer."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from swinmoe.config import OptimConfig
from swinmoe.errors import ConfigError
from swinmoe.models import SwinTransformer
from swinmoe.models.swin import NO_DECAY
from swinmoe.parallel import Mesh, make_adamw
from swinmoe.train.layer_decay import rate_scale_of


def decays(name: str, parameter: nn.Parameter) -> bool:
    """True if weight decay applies: to matrices, the linear gate's too; not to norms, biases, and the like
    (`models.swin.NO_DECAY`: position biases, attention scales, stacked expert biases, the cosine router)."""
    if parameter.ndim <= 1 or name.endswith(".bias"):
        return False
    return NO_DECAY.search(name) is None


def rate_scale(optim: OptimConfig, batch_size: int) -> float:
    """Linear scaling (Goyal et al. 2017): global batch over `lr_batch`, or 1."""
    return batch_size / optim.lr_batch if optim.lr_batch else 1.0


def make_optimizer(model: nn.Module, optim: OptimConfig, mesh: Mesh | None = None) -> Optimizer:
    """AdamW over the groups of `optimizer_groups`.

    `set_rate` gives every group its rate, at every step. `mesh` says who shares the moments (`parallel.zero`); None =
    nobody.

    Raises:
        ConfigError: `layer_decay` for a model whose layers are not known.
        BackendUnavailableError: `parallel.zero` without FairScale.
    """
    groups = optimizer_groups(model, optim)
    return make_adamw(groups, mesh or Mesh(), lr=optim.base_lr, betas=optim.betas, eps=optim.eps)


def optimizer_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """All trainable parameters: two groups, with and without weight decay, or two for each layer.

    Raises:
        ConfigError: `layer_decay` for a model whose layers are not known.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = _scale(model, name, optim.layer_decay)
            groups.setdefault((scale, decays(name, parameter)), []).append(parameter)
    return [
        {"params": groups[scale, decay], "weight_decay": optim.weight_decay * decay, "rate_scale": scale}
        for scale, decay in sorted(groups, key=lambda key: (key[0], not key[1]))
    ]


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Let every group learn at `rate` times its own scale (1 without layer-wise decay)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]


def _scale(model: nn.Module, name: str, decay: float) -> float:
    if decay == 1:
        return 1.0
    if not isinstance(model, SwinTransformer):
        raise ConfigError(f"optim.layer_decay={decay} needs a Swin Transformer, whose layers are known; use 1")
    return rate_scale_of(name, model.config.depths, decay)
