"""A Python that runs `swinmoe` with a fault in one rank; `faults.py` lets the launchers start it in Python's place.

FAULT names the fault, FAULT_RANK the rank and FAULT_STEP the optimiser step that does not happen. After a restart, and
on all other ranks, it is Python.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def break_down(fault: str) -> None:
    """Whatever `fault` says, to this process."""
    if fault == "raise":
        raise ValueError("the sky fell on this rank")
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])


def main() -> None:
    arguments = sys.argv[1:]
    here = os.environ.get("RANK") == os.environ["FAULT_RANK"]
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if not here or again or "swinmoe.cli" not in arguments:
        os.execv(sys.executable, [sys.executable, *arguments])
    fault, step = os.environ["FAULT"], int(os.environ["FAULT_STEP"])
    sys.argv = ["swinmoe", *arguments[arguments.index("swinmoe.cli") + 1 :]]
    if fault == "config":
        sys.argv.append("optim.base_lr=0.5")
    else:
        from swinmoe.train.arm import Arm

        sound = Arm.train_step

        def train_step(self: Arm, batches: Any) -> None:
            if self.step == step:
                break_down(fault)
            sound(self, batches)

        Arm.train_step = train_step  # type: ignore[method-assign]
    from swinmoe.cli import main as run

    run()


if __name__ == "__main__":
    main()
