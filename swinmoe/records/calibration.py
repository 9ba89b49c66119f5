"""What evaluation writes down of a model's confidence, and reports draw."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConfidenceBin:
    """Images whose confidence lies in (low, high]."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean; 0 without images."""
    accuracy: float
