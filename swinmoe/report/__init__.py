"""From run records to a report that a person understands in a minute. Reads records only, never models."""

from swinmoe.report.interval import Estimate, estimate
from swinmoe.report.render import ReportPaths, write_report
from swinmoe.report.summarise import ArmSummary, Difference, Progress, Summary, summary

__all__ = [
    "ArmSummary",
    "Difference",
    "Estimate",
    "Progress",
    "ReportPaths",
    "Summary",
    "estimate",
    "summary",
    "write_report",
]
