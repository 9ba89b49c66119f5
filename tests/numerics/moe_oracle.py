"""The expert layer as plain loops over tokens, choices and experts: slow, obvious, and independent of swinmoe.moe.

Differentiable, so that gradients can be compared too. Reads parameters of a `MoEMlp`; shares none of its code.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from swinmoe.config import MoEConfig


def slots_per_expert(cfg: MoEConfig, policy, num_tokens: int) -> float:
    if policy.kind == "dropless":
        return math.inf
    return max(policy.min_slots, cfg.top_k * int(policy.factor * math.ceil(num_tokens / cfg.num_experts)))


def one_expert(row: Tensor, w1: Tensor, b1, w2: Tensor, b2, kind: str) -> Tensor:
    pre = w1 @ row
    if b1 is not None:
        pre = pre + b1
    if kind in ("gelu", "relu"):
        hidden = F.gelu(pre) if kind == "gelu" else F.relu(pre)
    else:
        hidden = torch.stack([pre[2 * i] * F.silu(pre[2 * i + 1]) for i in range(len(pre) // 2)])
    out = w2 @ hidden
    return out if b2 is None else out + b2


def stack_of(experts, e: int):
    pick = lambda p: None if p is None else p[e]  # noqa: E731
    return experts.fc1_weight[e], pick(experts.fc1_bias), experts.fc2_weight[e], pick(experts.fc2_bias)


def loop_moe(layer, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, list[int], list[int]]:
    """(T, D) -> output, routed per expert, kept per expert."""
    cfg: MoEConfig = layer.cfg
    policy = cfg.capacity.train if layer.training else cfg.capacity.eval
    num_tokens, num_experts = len(x), cfg.num_experts
    logits = [layer.router.weight @ x[t] for t in range(num_tokens)]
    if noise is not None:
        logits = [row + noise[t] for t, row in enumerate(logits)]
    scores = [row.softmax(0) if cfg.router.score == "softmax" else row.sigmoid() for row in logits]
    chosen = []
    for row in scores:
        ranking = (row if layer.router.expert_bias is None else row + layer.router.expert_bias).tolist()
        chosen.append(sorted(range(num_experts), key=ranking.__getitem__, reverse=True)[: cfg.top_k])
    order = list(range(num_tokens))
    if cfg.router.batch_prioritized:
        order.sort(key=lambda t: -scores[t].max().item())
    limit = slots_per_expert(cfg, policy, num_tokens)
    routed, kept = [0] * num_experts, [0] * num_experts
    y = 0 * x
    parts: list[list[Tensor]] = [[] for _ in range(num_tokens)]
    for choice in range(cfg.top_k):
        for t in order:
            e = chosen[t][choice]
            routed[e] += 1
            if routed[e] > limit:
                continue
            kept[e] += 1
            gate = scores[t][e]
            if cfg.router.normalize_gates and cfg.top_k > 1:
                gate = gate / sum(scores[t][c] for c in chosen[t])
            parts[t].append(gate * one_expert(x[t], *stack_of(layer.experts, e), cfg.experts.type))
    if num_tokens:
        y = torch.stack([sum(p, torch.zeros_like(x[t])) for t, p in enumerate(parts)])
    if layer.shared is not None and num_tokens:
        y = y + torch.stack([one_expert(row, *stack_of(layer.shared, 0), cfg.experts.type) for row in x])
    return y, routed, kept
