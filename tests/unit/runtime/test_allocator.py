"""What is freed stays: seen by the page faults of the next allocation of the same size."""

import os
import subprocess
import sys

import pytest

# Aligned pieces leave crumbs between them, which for the first few rounds keep what is freed apart.
PROGRAM = """
import resource, sys, torch
from swinmoe.runtime import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "kept" else None
def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(megabytes * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, [faults(40) for _ in range(20)][-1], faults(300))
"""


def run(what: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_freed_memory_is_there_for_the_next_step() -> None:
    told, again, large = run("kept")
    if told == "False":
        pytest.skip("another C library than glibc, or told how to allocate")
    _, without, _ = run("plain")
    assert int(again) < 100 < int(without)  # 10,240 pages of 4 KiB, or fewer larger ones
    assert int(large) > 100  # beyond the limit, memory goes back


@pytest.mark.parametrize("variable", [{"MALLOC_ARENA_MAX_": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}])
def test_who_has_said_how_to_allocate_is_obeyed(variable: dict[str, str]) -> None:
    assert run("kept", **variable)[0] == "False"
