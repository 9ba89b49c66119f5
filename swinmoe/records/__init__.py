"""Append-only run records: the only thing that reports read."""

from swinmoe.records.calibration import ConfidenceBin
from swinmoe.records.record import RECORD_KINDS, RunRecord, read_records

__all__ = ["RECORD_KINDS", "ConfidenceBin", "RunRecord", "read_records"]
