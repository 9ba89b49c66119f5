"""What predictions are worth: accuracy, by class, and whether confidence is deserved. Pure functions.

Shapes: N images, L classes, K best classes of each image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from swinmoe.records import ConfidenceBin

BINS = 15
"""As in Guo et al. 2017."""
BEST = 5


@dataclass(frozen=True)
class Predictions:
    """What is kept of every image's logits, on the host."""

    targets: Tensor
    """(N,) int64."""
    best: Tensor
    """(N, K) int64 classes, most likely first; K = min(5, L)."""
    confidence: Tensor
    """(N,) float64 probability of the most likely class."""
    loss: Tensor
    """(N,) float64 cross entropy, nats."""

    @staticmethod
    def of(logits: Tensor, targets: Tensor) -> Predictions:
        """From (N, L) logits."""
        logits, targets = logits.double(), targets.to(logits.device)
        log_probs = F.log_softmax(logits, dim=-1)
        top = log_probs.topk(min(BEST, logits.shape[1]), dim=-1)
        loss = F.nll_loss(log_probs, targets, reduction="none")
        return Predictions(targets.cpu(), top.indices.cpu(), top.values[:, 0].exp().cpu(), loss.cpu())

    @staticmethod
    def join(parts: list[Predictions]) -> Predictions:
        """Of several batches."""
        names = ("targets", "best", "confidence", "loss")
        return Predictions(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    @property
    def correct(self) -> Tensor:
        """(N,) bool."""
        return self.best[:, 0] == self.targets

    def accuracy(self, among: int = 1) -> float:
        """Share of images whose class is among the `among` most likely."""
        return float((self.best[:, :among] == self.targets[:, None]).any(1).double().mean())


@dataclass(frozen=True)
class ClassScore:
    """One class."""

    count: int
    """Images of it."""
    accuracy: float | None
    """Of those, recognised; None without any."""
    precision: float | None
    """Of the images taken for it, those that are; None without any."""
    taken_for: int | None
    """The class that most of its unrecognised images were taken for."""


def by_class(predictions: Predictions, num_classes: int) -> list[ClassScore]:
    """Every class's score."""
    table = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    # Classes of the head beyond the data's can be predicted, and count as taken for something else.
    known = predictions.best[:, 0] < num_classes
    flat = predictions.targets[known] * num_classes + predictions.best[known, 0]
    table += torch.bincount(flat, minlength=num_classes**2).view(num_classes, num_classes)
    counts = torch.bincount(predictions.targets, minlength=num_classes)
    taken, right = table.sum(0), table.diagonal()
    scores = []
    for index in range(num_classes):
        wrong = table[index].clone()
        wrong[index] = 0
        scores.append(
            ClassScore(
                int(counts[index]),
                int(right[index]) / int(counts[index]) if counts[index] else None,
                int(right[index]) / int(taken[index]) if taken[index] else None,
                int(wrong.argmax()) if wrong.any() else None,
            )
        )
    return scores


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy (Guo et al. 2017)."""

    bins: tuple[ConfidenceBin, ...]
    ece: float
    """Expected calibration error: Σ_b n_b/N · |accuracy_b − confidence_b|."""
    mce: float
    """The largest of these differences."""


def calibration(confidence: Tensor, correct: Tensor, bins: int = BINS) -> Calibration:
    """Bins of equal width over (0, 1], and the distance between what a model says and how often it is right.

    Args:
        confidence: (N,) in [0, 1]; 0 counts with the first bin.
        correct: (N,) bool.
        bins: how many.
    """
    confidence = confidence.double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts = torch.bincount(index, minlength=bins)
    said = torch.bincount(index, weights=confidence, minlength=bins) / counts.clamp(min=1)
    true = torch.bincount(index, weights=correct.double(), minlength=bins) / counts.clamp(min=1)
    gaps = (said - true).abs()
    found = tuple(
        ConfidenceBin(b / bins, (b + 1) / bins, int(counts[b]), float(said[b]), float(true[b])) for b in range(bins)
    )
    share = counts.double() / max(1, len(confidence))
    return Calibration(found, float((share * gaps).sum()), float(gaps.max()))
