"""How many slots an expert has: C = max(min_slots, k·int(factor·ceil(T/E))), counted per source rank.

The rounding is Tutel's (Hwang et al. 2023): the integer part is taken before the multiplication by k. All of it is host
arithmetic on shapes; nothing here looks at where tokens went. Under `torch.export` with a dynamic batch the number of
tokens is a symbol, and so is the capacity: `sym_int` and `sym_max` are `int` and `max` for numbers.
"""

from __future__ import annotations

import torch

from swinmoe.config.moe import CapacityPolicy
from swinmoe.errors import ConfigError


def capacity(policy: CapacityPolicy, num_tokens: int, num_experts: int, top_k: int) -> int | None:
    """Most choices that one expert keeps of `num_tokens` tokens; None = all of them (`dropless`)."""
    if policy.kind == "dropless":
        return None
    share = -(-num_tokens // num_experts)
    slots = torch.sym_int(policy.factor * share)
    return torch.sym_max(policy.min_slots, top_k * slots)  # type: ignore[return-value]  # a symbol is told to be an int


def allowed_drops(policy: CapacityPolicy, num_tokens: int, top_k: int) -> int | None:
    """Choices of `num_tokens` tokens that `adaptive` may drop, whatever its factor; None = no such promise."""
    if policy.kind != "adaptive":
        return None
    return torch.sym_int(policy.adapt.max_drop * (num_tokens * top_k))


def require_slots(policy: CapacityPolicy, num_tokens: int, num_experts: int, top_k: int) -> None:
    """Refuse a policy that leaves experts without a slot at the batch it is meant for.

    Args:
        policy: the policy of training or of evaluation.
        num_tokens: tokens that one process's micro-batch brings to the layer.
        num_experts: experts, counted globally.
        top_k: choices per token.

    Raises:
        ConfigError: every token would be dropped.
    """
    if policy.kind != "adaptive" and num_tokens and capacity(policy, num_tokens, num_experts, top_k) == 0:
        raise ConfigError(
            f"capacity factor {policy.factor} gives every expert 0 slots at {num_tokens} tokens per process, "
            f"{num_experts} experts and top_k={top_k}, so all tokens would be dropped; use min_slots >= 1, a factor of "
            f"at least {1 / -(-num_tokens // num_experts):.3g}, or kind='dropless'"
        )
