"""Scores against cases counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from swinmoe.train.evaluate_scores import Predictions, by_class, calibration


def test_calibration_of_six_images_counted_by_hand() -> None:
    """Two bins. (0, 0.5]: confidences 0.25 and 0.5, one right: |0.5 - 0.375| = 0.125. (0.5, 1]: 0.75, 0.75, 1, 1, three
    right: |0.75 - 0.875| = 0.125 ... of the first 2/6, of the second 4/6."""
    confidence = torch.tensor([0.25, 0.5, 0.75, 0.75, 1.0, 1.0])
    correct = torch.tensor([True, False, True, False, True, True])
    found = calibration(confidence, correct, bins=2)
    assert [b.count for b in found.bins] == [2, 4]
    assert [b.confidence for b in found.bins] == [0.375, 0.875]
    assert [b.accuracy for b in found.bins] == [0.5, 0.75]
    assert found.ece == pytest.approx(0.125) and found.mce == pytest.approx(0.125)


def test_calibration_weighs_bins_by_their_images() -> None:
    """Three images at 0.9, all wrong (gap 0.9), one at 0.15, right (gap 0.85), one at 0.3, wrong."""
    found = calibration(
        torch.tensor([0.9, 0.9, 0.9, 0.15, 0.3]).double(), torch.tensor([False, False, False, True, False]), 10
    )
    assert found.ece == pytest.approx((3 * 0.9 + 0.85 + 0.3) / 5)
    assert found.mce == pytest.approx(0.9)
    assert sum(b.count for b in found.bins) == 5 and found.bins[1].count == 1 and found.bins[8].count == 3


def test_confidence_at_the_ends_has_a_bin() -> None:
    found = calibration(torch.tensor([0.0, 1.0]), torch.tensor([False, True]), 4)
    assert found.bins[0].count == 1 and found.bins[3].count == 1 and found.ece == 0.0


def test_predictions_keep_what_logits_say() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 1.0]])
    found = Predictions.of(logits, torch.tensor([0, 2]))
    assert found.best.tolist()[1] == [1, 2, 0] and found.correct.tolist() == [True, False]
    assert float(found.confidence[0]) == pytest.approx(math.exp(2) / (math.exp(2) + 2))
    assert float(found.loss[1]) == pytest.approx(math.log(1 + math.e**3 + math.e) - 1)
    assert found.accuracy() == 0.5 and found.accuracy(2) == 1.0
    assert torch.equal(Predictions.join([found, found]).targets, torch.tensor([0, 2, 0, 2]))


def test_classes_counted_by_hand() -> None:
    """Class 0: three images, taken for 0, 1, 1. Class 1: one, recognised. Class 2: none, but one image taken for it...
    which is of class 1; the head has a fourth class, that data does not know."""
    targets = torch.tensor([0, 0, 0, 1, 1, 1])
    guesses = torch.tensor([0, 1, 1, 1, 2, 3])
    best = torch.stack([guesses, (guesses + 1) % 4], dim=1)
    ones = torch.ones(6, dtype=torch.float64)
    none, one, two = by_class(Predictions(targets, best, ones, ones), 3)
    assert (none.count, none.accuracy, none.precision, none.taken_for) == (3, pytest.approx(1 / 3), 1.0, 1)
    assert (one.count, one.accuracy, one.precision, one.taken_for) == (3, pytest.approx(1 / 3), pytest.approx(1 / 3), 2)
    assert (two.count, two.accuracy, two.precision, two.taken_for) == (0, None, 0.0, None)
