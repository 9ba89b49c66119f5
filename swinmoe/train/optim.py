"""AdamW with the no-decay set of the Swin family, and the linear scaling of its rates."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW

from swinmoe.config import OptimConfig
from swinmoe.models.swin import NO_DECAY


def decays(name: str, parameter: nn.Parameter) -> bool:
    """True if weight decay applies: to matrices, the linear gate's too; not to norms, biases, and the like
    (`models.swin.NO_DECAY`: position biases, attention scales, stacked expert biases, the cosine router)."""
    if parameter.ndim <= 1 or name.endswith(".bias"):
        return False
    return NO_DECAY.search(name) is None


def rate_scale(optim: OptimConfig, batch_size: int) -> float:
    """Linear scaling (Goyal et al. 2017): global batch over `lr_batch`, or 1."""
    return batch_size / optim.lr_batch if optim.lr_batch else 1.0


def make_optimizer(model: nn.Module, optim: OptimConfig) -> AdamW:
    """AdamW over all trainable parameters in two groups; its rate is set at every step by the schedule."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decay if decays(name, parameter) else plain).append(parameter)
    groups = [{"params": decay, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return AdamW([g for g in groups if g["params"]], lr=optim.base_lr, betas=optim.betas, eps=optim.eps, fused=True)
