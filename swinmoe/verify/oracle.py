"""An expert layer as its definition reads, to hold the real one against: loops, one process, ordinary autograd.

Shapes: T tokens of all routing groups one after another, D width, E experts, K choices.

It takes the parameters of a `MoEMlp` and the logits of its router, and nothing else of `swinmoe.moe`: choices, queues,
capacity, gates, experts and balance losses are computed here once more. A routing group is what one rank brings: its
tokens compete for its own slots, draw its own noise and, where losses are local, are balanced by themselves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinmoe.config.moe import BalanceLossConfig, CapacityPolicy
from swinmoe.models import SwinTransformer
from swinmoe.models.block import SwinBlock
from swinmoe.moe import Experts, ExpertWeights, MoEMlp, RoutingStats
from swinmoe.randomness import derive_seed


class OracleMoEMlp(MoEMlp):
    """Stands where `layer` stood and owns its parameters under the same names.

    `shares` says how many tokens each routing group has: the numbers themselves, or any in proportion to them
    (images, say); they lie one group after another. `noise_keys` are the seeds of the groups' gate noise.
    """

    def __init__(self, layer: MoEMlp) -> None:
        nn.Module.__init__(self)  # not MoEMlp's: the parameters are there already
        self.cfg, self.name = layer.cfg, layer.name
        self.dim, self.hidden_dim = layer.dim, layer.hidden_dim
        self.num_experts, self.top_k = layer.num_experts, layer.top_k
        self.router, self.experts, self.shared = layer.router, layer.experts, layer.shared
        self.shares: tuple[int, ...] = (1,)
        self.noise_keys: tuple[int, ...] = (0,)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, RoutingStats]:
        """(*, D) -> (*, D) and the statistics of all groups; `noise` (T, E) is drawn by `noise_keys` if not given."""
        tokens = x.reshape(-1, self.dim)
        groups = self._groups(len(tokens))
        if noise is None:
            noise = self.draw_noise(len(tokens), tokens.device)
        wide = torch.promote_types(tokens.dtype, torch.float32) if self.cfg.router.fp32 else tokens.dtype
        logits = self.router.score(tokens.to(wide))
        noisy = logits if noise is None else logits + noise.to(logits.dtype)
        scores = noisy.softmax(-1) if self.cfg.router.score == "softmax" else noisy.sigmoid()
        chosen = self._choose(noisy, scores)
        kept = [choice for group in groups for choice in self._seat(chosen, scores, group)]
        out = self._mix(tokens, scores, chosen, kept)
        if self.shared is not None:
            out = out + _apply(self.shared, 0, tokens)
        return out.view(x.shape), self._report(logits, noisy, scores, chosen, kept, groups)

    def _groups(self, num_tokens: int) -> list[range]:
        ends, whole = [0], sum(self.shares)
        for share in self.shares:
            ends.append(ends[-1] + (num_tokens * share // whole if whole else 0))
        assert ends[-1] == num_tokens, f"{num_tokens} tokens do not fall into groups of {self.shares}"
        return [range(start, stop) for start, stop in pairwise(ends)]

    def draw_noise(self, num_tokens: int, device: torch.device | str) -> Tensor | None:
        """(num_tokens, E), each group's by its own key."""
        if not self.training or self.cfg.router.noise == 0:
            return None
        drawn = []
        for group, key in zip(self._groups(num_tokens), self.noise_keys, strict=True):
            self.seed_noise(key)
            noise = super().draw_noise(len(group), device)
            assert noise is not None
            drawn.append(noise)
        return torch.cat(drawn)

    def _choose(self, noisy: Tensor, scores: Tensor) -> list[list[int]]:
        """Each token's K experts, best first."""
        bias = self.router.expert_bias
        ranking = (noisy if bias is None else scores + bias.to(scores.dtype)).tolist()
        return [sorted(range(len(row)), key=row.__getitem__, reverse=True)[: self.top_k] for row in ranking]

    def _seat(self, chosen: list[list[int]], scores: Tensor, group: range) -> list[tuple[int, int]]:
        """The (token, choice) pairs of one group that find a slot: first choices of all tokens, then second ones."""
        policy = self.cfg.capacity.train if self.training else self.cfg.capacity.eval
        slots = _slots(policy, len(group), self.num_experts, self.top_k)
        if policy.kind == "adaptive":
            loads = Counter(expert for token in group for expert in chosen[token]).values()
            while sum(max(0, load - slots) for load in loads) > policy.adapt.max_drop * (len(group) * self.top_k):
                slots += 1
        free = [slots] * self.num_experts
        turn = list(group)
        if self.cfg.router.batch_prioritized:
            best = scores.detach().amax(-1).tolist()
            turn.sort(key=lambda token: -best[token])
        seated = []
        for choice in range(self.top_k):
            for token in turn:
                expert = chosen[token][choice]
                if free[expert] > 0:
                    free[expert] -= 1
                    seated.append((token, choice))
        return seated

    def _mix(self, tokens: Tensor, scores: Tensor, chosen: list[list[int]], kept: list[tuple[int, int]]) -> Tensor:
        """y_t = Σ over kept choices of gate·expert(x_t)."""
        visitors: list[list[int]] = [[] for _ in range(self.num_experts)]
        for token, choice in kept:
            visitors[chosen[token][choice]].append(token)
        whole = torch.ones_like(scores[:, 0])
        if self.cfg.router.normalize_gates and self.top_k > 1 and chosen:
            whole = torch.stack([scores[token, experts].sum() for token, experts in enumerate(chosen)])
        out = torch.zeros_like(tokens)
        for expert, guests in enumerate(visitors):
            at = torch.tensor(guests, dtype=torch.int64, device=tokens.device)
            gates = (scores[at, expert] / whole[at]).to(tokens.dtype)
            out = out.index_add(0, at, gates.unsqueeze(1) * _apply(self.experts, expert, tokens[at]))
        return out

    def _report(
        self,
        logits: Tensor,
        noisy: Tensor,
        scores: Tensor,
        chosen: list[list[int]],
        kept: list[tuple[int, int]],
        groups: list[range],
    ) -> RoutingStats:
        cfg = self.cfg
        ids = torch.tensor(chosen, dtype=torch.int64, device=logits.device).view(-1, self.top_k)
        seats = torch.full_like(ids, -1)
        for token, choice in kept:
            seats[token, choice] = ids[token, choice]
        shared = scores if cfg.router.score == "softmax" else scores / scores.sum(-1, keepdim=True)
        sigma = cfg.router.noise / self.num_experts
        # Local losses are each group's own, and their mean over groups counts.
        batches = [slice(group.start, group.stop) for group in groups]
        if cfg.losses.batch == "global":
            batches = [slice(None)]
        losses: dict[str, Tensor] = {}
        for name in ("gshard", "importance", "load", "importance_load", "importance_load_tutel", "z"):
            if getattr(cfg.losses, name) > 0:
                parts = [balance_loss(name, logits[at], noisy[at], shared[at], ids[at], sigma) for at in batches]
                losses[name] = torch.stack(parts).mean()
        return RoutingStats(
            routed=torch.bincount(ids.flatten(), minlength=self.num_experts),
            kept=torch.bincount(seats[seats >= 0], minlength=self.num_experts),
            tokens=torch.tensor(len(ids), device=ids.device),
            entropy_sum=torch.special.entr(shared.detach()).sum(dtype=torch.float32),
            losses={name: loss.detach() for name, loss in losses.items()},
            loss=_weighted(cfg.losses, losses, logits),
            expert_ids=seats,
        )


def _slots(policy: CapacityPolicy, num_tokens: int, num_experts: int, top_k: int) -> float:
    """Slots per expert of a group: max(min_slots, k·int(factor·⌈T/E⌉)) (Tutel's rounding)."""
    if policy.kind == "dropless":
        return math.inf
    return max(policy.min_slots, top_k * int(policy.factor * math.ceil(num_tokens / num_experts)))


def _apply(experts: nn.Module, expert: int, rows: Tensor) -> Tensor:
    """fc2(activation(fc1(rows))) of one expert; one of another kind is asked for its own function, by itself."""
    assert isinstance(experts, Experts)
    stack = experts.weights()
    fc1, fc2 = stack.fc1[expert], stack.fc2[expert]
    b1, b2 = (None if bias is None else bias[expert] for bias in (stack.b1, stack.b2))
    if type(experts).function is not Experts.function:
        biases = [None if bias is None else bias.unsqueeze(0) for bias in (b1, b2)]
        alone = ExpertWeights(fc1.unsqueeze(0), biases[0], fc2.unsqueeze(0), biases[1])
        return experts.function(False)(rows.unsqueeze(0), None, alone).squeeze(0)
    return F.linear(experts.activation.value(F.linear(rows, fc1, b1)), fc2, b2)


def balance_loss(name: str, logits: Tensor, noisy: Tensor, shares: Tensor, ids: Tensor, sigma: float) -> Tensor:
    """One auxiliary loss () of a batch of tokens, by its definition; 0 for an empty batch.

    Args:
        name: as in `BalanceLossConfig`, where each is cited.
        logits, noisy: (T, E) before and after gate noise.
        shares: (T, E) probabilities that sum to 1 per token.
        ids: (T, K) choices before drops.
        sigma: standard deviation of the noise.
    """
    if len(ids) == 0:
        return logits.sum() * 0
    experts = logits.shape[1]
    if name == "gshard":
        first = torch.stack([(ids[:, 0] == expert).to(shares.dtype).mean() for expert in range(experts)])
        return experts * (shares.mean(0) * first).sum()
    if name == "z":
        return logits.exp().sum(-1).log().square().mean()
    importance = _spread(logits.softmax(-1).sum(0))
    if name == "importance":
        return importance
    bar = torch.stack([noisy[token, row[-1]] for token, row in enumerate(ids)])  # noisy logit of the last choice
    compared = logits.softmax(-1) if name == "importance_load_tutel" else logits
    load = _spread(torch.special.ndtr((compared - bar.unsqueeze(1)) / sigma).sum(0))
    return load if name == "load" else (importance + load) / 2


def _spread(values: Tensor) -> Tensor:
    """(σ/µ)², unbiased."""
    if len(values) < 2:
        return values.sum() * 0
    mean = values.sum() / len(values)
    return ((values - mean).square().sum() / (len(values) - 1)) / (mean.square() + 1e-10)


def _weighted(cfg: BalanceLossConfig, losses: dict[str, Tensor], like: Tensor) -> Tensor:
    return sum((getattr(cfg, name) * loss for name, loss in losses.items()), like.new_zeros(()))


def install(model: SwinTransformer) -> None:
    """Put an oracle in the place of each expert layer of `model`; parameters and their names stay."""
    model.set_grad_checkpointing(False)  # recomputation would walk round the oracle's forward
    for block in model.modules():
        if isinstance(block, SwinBlock) and isinstance(block.mlp, MoEMlp):
            block.mlp = OracleMoEMlp(block.mlp)


def set_groups(model: SwinTransformer, shares: Sequence[int], key: Sequence[int | str]) -> None:
    """Before a forward pass: group r brings `shares[r]` images, and draws its noise by (*key, r, layer)."""
    for name, layer in model.moe_layers().items():
        assert isinstance(layer, OracleMoEMlp)
        layer.shares = tuple(shares)
        layer.noise_keys = tuple(derive_seed(*key, rank, name) for rank in range(len(shares)))
