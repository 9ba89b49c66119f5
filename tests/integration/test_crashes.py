"""Kills at any moment and files spoilt in every way: what was saved stays, what is spoilt is refused by name.

SWINMOE_FULL=1 runs the numbers of docs/results: 500 kills, 100 of them of two processes, 1,000 corruptions.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = os.environ.get("SWINMOE_FULL") == "1"


def _crashes(*arguments: int) -> str:
    """In a process of its own: it forks, and pytest's has threads."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("crashes.py")), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(3000)
def test_killed_again_and_again() -> None:
    kills, of_two = (400, 100) if FULL else (15, 5)
    said = _crashes(kills, 0, of_two)
    assert f"{kills} kills of 1 process," in said and f"{of_two} kills of 2 processes," in said


@pytest.mark.timeout(3000)
def test_spoilt_again_and_again() -> None:
    times = 1000 if FULL else 100
    assert f"{times} corruptions, all refused" in _crashes(0, times)
