"""From run records to a report that a person understands in a minute. Reads records only, never models."""

from swinmoe.report.interval import Estimate, estimate, interval_name
from swinmoe.report.profile_data import experts_said, has_measurements, has_profile
from swinmoe.report.profile_page import ProfileReport, write_profile_report
from swinmoe.report.render import ReportPaths, write_report
from swinmoe.report.summarise import ArmSummary, Difference, Progress, Summary, summary

__all__ = [
    "ArmSummary",
    "Difference",
    "Estimate",
    "ProfileReport",
    "Progress",
    "ReportPaths",
    "Summary",
    "estimate",
    "experts_said",
    "has_measurements",
    "has_profile",
    "interval_name",
    "summary",
    "write_profile_report",
    "write_report",
]
