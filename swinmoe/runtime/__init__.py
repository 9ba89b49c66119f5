"""The process around a run: accelerator, process group, seeds, logging, and what machine and code it was."""

from swinmoe.runtime.accelerator import make_accelerator
from swinmoe.runtime.agreement import UNKNOWN, agree, from_all, from_first
from swinmoe.runtime.allocator import keep_freed_memory
from swinmoe.runtime.environment import describe_code, describe_environment
from swinmoe.runtime.last_words import last_word
from swinmoe.runtime.processes import (
    launched_local_world,
    launched_rank,
    launched_restarts_allowed,
    launched_world,
    start_processes,
    stop_processes,
)
from swinmoe.runtime.tf32 import use_tf32

__all__ = [
    "UNKNOWN",
    "agree",
    "describe_code",
    "describe_environment",
    "from_all",
    "from_first",
    "keep_freed_memory",
    "last_word",
    "launched_local_world",
    "launched_rank",
    "launched_restarts_allowed",
    "launched_world",
    "make_accelerator",
    "start_processes",
    "stop_processes",
    "use_tf32",
]
