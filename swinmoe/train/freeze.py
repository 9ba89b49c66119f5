"""Which parameters keep the values that they came with.

Swin-MoE gains on detection only with its expert layers frozen (COCO 53.4 box AP against 51.3 tuned and 53.0 dense:
Hwang et al. 2023, table 10): fine-tuning sets are small, and the experts that they rarely visit are overwritten.
"""

from __future__ import annotations

from swinmoe.config.finetune import FreezePolicy
from swinmoe.errors import ConfigError
from swinmoe.models import SwinTransformer

_PARTS: dict[FreezePolicy, tuple[str, ...]] = {
    "router": ("router.",),
    "experts": ("experts.", "shared."),
    "moe": ("",),
}


def freeze(model: SwinTransformer, policy: FreezePolicy) -> tuple[str, ...]:
    """Stop gradients to the parameters that `policy` names, before experts are spread and the optimiser is made.

    Frozen parameters take no optimiser state and no weight decay, and stay equal to the bit; gradients pass through
    them to what lies below. A router's bias of loss-free balancing rests with the router.

    Returns:
        Names of the parameters that do not train, those included that never do (`fc2_bias: frozen-zero`).

    Raises:
        ConfigError: a policy of expert layers for a dense model, or nothing would be left to train.
    """
    layers = tuple(model.moe_layers())
    if policy in _PARTS and not layers:
        raise ConfigError(
            f"finetune.freeze={policy!r} freezes parts of expert layers, and the model is dense; use none"
        )
    if policy == "backbone" and model.num_classes == 0:
        raise ConfigError(
            "finetune.freeze='backbone' trains the head alone, and model.num_classes=0 means there is none"
        )
    prefixes = tuple(f"{layer}.{part}" for layer in layers for part in _PARTS.get(policy, ()))
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes) if prefixes else policy == "backbone" and not name.startswith("head."):
            parameter.requires_grad_(False)
    return tuple(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
