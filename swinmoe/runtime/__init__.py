"""The process around a run: accelerator, process group, seeds, logging, and what machine and code it was."""

from swinmoe.runtime.accelerator import make_accelerator
from swinmoe.runtime.agreement import agree
from swinmoe.runtime.environment import describe_environment
from swinmoe.runtime.logging import get_console, get_logger
from swinmoe.runtime.processes import is_main_process, launched_rank, launched_world, start_processes, stop_processes
from swinmoe.runtime.seed import set_determinism

__all__ = [
    "agree",
    "describe_environment",
    "get_console",
    "get_logger",
    "is_main_process",
    "launched_rank",
    "launched_world",
    "make_accelerator",
    "set_determinism",
    "start_processes",
    "stop_processes",
]
