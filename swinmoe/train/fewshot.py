"""Few-shot linear probes and nearest neighbours on frozen features; no gradient step anywhere.

The probe is BiT's and V-MoE's (Kolesnikov et al. 2020; Riquelme et al. 2021, the "5-shot" column of Swin-MoE's table):
least squares from standardised features to ±1 for each class, with an L2 penalty on the weights and none on the offset.

Shapes: n shots in all, D width, L classes, q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from swinmoe.errors import DataError
from swinmoe.randomness import generator

STRENGTHS = tuple(2.0**power for power in range(-10, 21, 2))
TEMPERATURE = 0.07
"""Of the neighbours' votes (Wu et al. 2018; DINO)."""


@dataclass(frozen=True)
class Ridge:
    """A fitted probe: scores are x @ weight + offset."""

    weight: Tensor
    """(D, L)"""
    offset: Tensor
    """(L,)"""
    strength: float
    """λ, the one that was chosen."""
    errors: tuple[float, ...]
    """Mean squared error on the rows left out, for each λ that was tried."""

    def __call__(self, x: Tensor) -> Tensor:
        """(q, D) -> (q, L) scores."""
        return x @ self.weight + self.offset


def fit_ridge(x: Tensor, y: Tensor, strengths: Sequence[float]) -> Ridge:
    """min_W,b Σ_i |x_i W + b − y_i|² + λ|W|², λ being the one with the least squared error when each row is left out.

    Leaving out is exact and costs no second fit: the residual of row i grows by 1/(1 − h_ii), where h_ii = 1/n +
    Σ_j u_ij² s_j²/(s_j² + λ) for the singular values s and left vectors u of the centred x.

    Args:
        x: (n, D), y: (n, L).
        strengths: every λ to try; one for no choice.
    """
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    u, s, vt = torch.linalg.svd(x - mean_x, full_matrices=False)
    projected = u.T @ (y - mean_y)
    errors = []
    for strength in strengths:
        shrink = s.square() / (s.square() + strength)
        residual = y - mean_y - u @ (shrink[:, None] * projected)
        leverage = 1 / len(x) + u.square() @ shrink
        errors.append(float((residual / (1 - leverage).clamp(min=1e-12)[:, None]).square().mean()))
    chosen = strengths[errors.index(min(errors))]
    weight = vt.T @ ((s / (s.square() + chosen))[:, None] * projected)
    return Ridge(weight, mean_y - mean_x @ weight, chosen, tuple(errors))


def probe(
    shots: Tensor, classes: Tensor, queries: Tensor, num_classes: int, strengths: Sequence[float] = STRENGTHS
) -> tuple[Tensor, float]:
    """(q,) predicted classes of `queries` (q, D) after `shots` (n, D) of `classes` (n,), and the strength λ used.

    Features are standardised by the shots' own mean and deviation.
    """
    std, mean = torch.std_mean(shots.double(), dim=0, correction=0)
    scale = std + 1e-5
    goals = F.one_hot(classes, num_classes).double() * 2 - 1
    ridge = fit_ridge((shots.double() - mean) / scale, goals, strengths)
    return ridge((queries.double() - mean) / scale).argmax(1), ridge.strength


def draw_shots(targets: Tensor, num_classes: int, shots: int, draw: int) -> list[int]:
    """Indices of `shots` images of every class; which ones depends on (draw, class) only.

    Raises:
        DataError: a class has fewer images.
    """
    chosen: list[int] = []
    for label in range(num_classes):
        there = torch.nonzero(targets == label).flatten()
        if len(there) < shots:
            raise DataError(
                f"class {label} has {len(there)} training images, and {shots} shots are asked for; use --shots "
                f"{len(there)} or less, or data with more images of it"
            )
        order = torch.randperm(len(there), generator=generator("few-shot", draw, label))
        chosen += there[order[:shots]].tolist()
    return chosen


def nearest_neighbours(
    bank: Tensor, classes: Tensor, queries: Tensor, num_classes: int, neighbours: int, chunk: int = 1024
) -> Tensor:
    """(q,) classes by the votes of the `neighbours` rows of `bank` (n, D) that are nearest by cosine.

    A neighbour's vote weighs exp(cosine/0.07).
    """
    bank, queries = F.normalize(bank.double(), dim=1), F.normalize(queries.double(), dim=1)
    found = []
    for part in queries.split(chunk):
        similarity, index = (part @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        weights = ((similarity - similarity[:, :1]) / TEMPERATURE).exp()  # the best at 1: the same ratios
        votes = torch.zeros(len(part), num_classes, dtype=torch.float64)
        votes.scatter_add_(1, classes[index], weights)
        found.append(votes.argmax(1))
    return torch.cat(found)
