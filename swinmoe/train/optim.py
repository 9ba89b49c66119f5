"""AdamW with the no-decay set of the Swin family, and the linear scaling of its rates."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW

from swinmoe.config import OptimConfig

NO_DECAY_KEYWORDS = (
    "relative_position_bias_table",
    "absolute_pos_embed",
    "cpb_mlp",
    "logit_scale",
    "fc1_bias",
    "fc2_bias",
    "temperature",
    "projector",
    "sim_matrix",
)
"""Parts of names that are never decayed: position biases, attention scales, stacked expert biases (which have two axes)
and the cosine router, as in Microsoft's Swin-MoE. The linear gate's weight does decay."""


def decays(name: str, parameter: nn.Parameter) -> bool:
    """True if weight decay applies: matrices do; norms, biases and the names above do not."""
    if parameter.ndim <= 1 or name.endswith(".bias"):
        return False
    return not any(keyword in name for keyword in NO_DECAY_KEYWORDS)


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
