"""Auxiliary losses of one expert layer, as pure functions.

Shapes: T tokens, E experts, K choices; Σ_t runs over the batch, which may be spread over ranks.

Two steps, so that a batch spread over ranks has the losses of the whole: `batch_sums` adds up what the losses need over
this rank's tokens, the caller sums that vector over ranks, and `losses_from_sums` computes every loss from the total.
A squared coefficient of variation, or a product of two means, is not a mean of the ranks' own.

With no token at all every loss is 0 and so are its gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields

import torch
from torch import Tensor

from swinmoe.config.moe import BalanceLossConfig
from swinmoe.moe.types import Routing

LOSSES = ("gshard", "importance", "load", "importance_load", "importance_load_tutel", "z")
"""Names of the losses, as in `BalanceLossConfig`."""

_NEEDS = {
    "gshard": ("tokens", "probs", "top1"),
    "importance": ("importance",),
    "load": ("load",),
    "importance_load": ("importance", "load"),
    "importance_load_tutel": ("importance", "load_tutel"),
    "z": ("tokens", "z"),
}
assert set(LOSSES) <= {f.name for f in fields(BalanceLossConfig)}


def active_losses(cfg: BalanceLossConfig) -> tuple[str, ...]:
    """The losses with a weight above 0: only these are computed."""
    return tuple(name for name in LOSSES if getattr(cfg, name) > 0)


def _terms(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(term for name in names for term in _NEEDS[name]))


def batch_sums(names: Iterable[str], routing: Routing, distribution: Tensor, noise_std: float) -> Tensor:
    """The sums over this rank's tokens that the losses `names` need, in one vector.

    Args:
        names: losses to compute.
        routing: what the router decided.
        distribution: (T, E) probabilities that sum to 1 per token, from the noisy logits.
        noise_std: standard deviation of the gate noise in training, which smooths the load estimate.
    """
    return torch.cat([_sum_of(term, routing, distribution, noise_std).reshape(-1) for term in _terms(names)])


def _sum_of(term: str, routing: Routing, distribution: Tensor, noise_std: float) -> Tensor:
    logits = routing.logits
    match term:
        case "tokens":
            return logits.new_full((1,), logits.shape[0])
        case "probs":
            return distribution.sum(0)
        case "top1":
            return logits.new_zeros(logits.shape[1]).index_add_(
                0, routing.expert_ids[:, 0], logits.new_ones(logits.shape[0])
            )
        case "importance":
            return logits.softmax(-1).sum(0)
        case "load":
            return expected_load(logits, routing, noise_std)
        case "load_tutel":
            # Tutel compares the clean *probability* with the noisy logit of the last choice (its issue 240). Beyond
            # logits of about 1 the result underflows to 0 without a gradient.
            return expected_load(logits.softmax(-1), routing, noise_std)
        case "z":
            return logits.logsumexp(-1).square().sum()
    raise AssertionError(term)


def expected_load(scores: Tensor, routing: Routing, noise_std: float) -> Tensor:
    """Load_e = Σ_t P(a fresh noise draw puts e among the chosen) = Σ_t Φ((score_te − threshold_t)/σ), (E,).

    The threshold is the noisy logit of token t's last choice (V-MoE, Riquelme et al. 2021, appendix A). In evaluation,
    where no noise is added, σ still is that of training: the estimate stays defined and comparable.
    """
    threshold = routing.noisy_logits.gather(1, routing.expert_ids[:, -1:])
    return (0.5 * (1 + torch.erf((scores - threshold) / (noise_std * math.sqrt(2))))).sum(0)


def losses_from_sums(names: Iterable[str], sums: Tensor, num_experts: int) -> dict[str, Tensor]:
    """Each loss (0-dim, unweighted) from `batch_sums` of the whole batch."""
    names = tuple(names)
    sizes = [1 if term in ("tokens", "z") else num_experts for term in _terms(names)]
    parts = zip(_terms(names), sums.split(sizes), strict=True)
    # What only counts has no gradient, but is in one vector with what has.
    total = {term: part.detach() if term in ("tokens", "top1") else part for term, part in parts}
    return {name: _loss(name, total, num_experts) for name in names}


def _loss(name: str, total: dict[str, Tensor], num_experts: int) -> Tensor:
    match name:
        case "gshard":
            return gshard(total["probs"], total["top1"], total["tokens"][0])
        case "importance":
            return squared_cv(total["importance"])
        case "load":
            return squared_cv(total["load"])
        case "importance_load":
            return (squared_cv(total["importance"]) + squared_cv(total["load"])) / 2
        case "importance_load_tutel":
            return (squared_cv(total["importance"]) + squared_cv(total["load_tutel"])) / 2
        case "z":
            return total["z"][0] / total["tokens"][0].clamp(min=1)
    raise AssertionError(name)


def gshard(probs: Tensor, top1: Tensor, tokens: Tensor) -> Tensor:
    """E·Σ_e (Σ_t p_te/T)·(Σ_t 1[first choice of t = e]/T): GShard (Lepikhin et al. 2021, §2.2), Switch eq. 4.

    Args:
        probs: (E,) sums of probabilities.
        top1: (E,) counts of first choices, without a gradient.
        tokens: () T.
    """
    return torch.dot(probs, top1) * (len(probs) / tokens.clamp(min=1).square())


def squared_cv(values: Tensor) -> Tensor:
    """Squared coefficient of variation of (E,) values, unbiased variance over (mean² + 1e-10); 0 for one expert.

    Shazeer et al. 2017, eq. 7; Tutel's denominator.
    """
    if len(values) == 1:
        return values.sum() * 0
    return values.var() / (values.mean().square() + 1e-10)


def weighted(cfg: BalanceLossConfig, losses: dict[str, Tensor], like: Tensor) -> Tensor:
    """() sum of the losses by their weights; 0 without a gradient if there are none."""
    shares = [getattr(cfg, name) * loss for name, loss in losses.items()]
    return torch.stack(shares).sum() if len(shares) > 1 else shares[0] if shares else like.new_zeros(())
