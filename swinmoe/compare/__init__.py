"""Twins: several models trained side by side on the same batches, matched on what they may spend."""

from swinmoe.compare.arms import match_lengths, resolve_arms
from swinmoe.compare.run import compare

__all__ = ["compare", "match_lengths", "resolve_arms"]
