"""A trace for https://ui.perfetto.dev: torch's operators, and above them the phases that they belong to.

Phases have a track of their own: they begin and end inside autograd's nodes, where a slice of the same track would cut
across others. Their times are the host's; on CUDA that is when kernels were launched, and arrows lead from there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from swinmoe.moe import phases
from swinmoe.profiling.timeline import Timeline
from swinmoe.runtime.accelerator import wants_cpu

_TRACK = "phases"


@contextmanager
def traced(path: Path, device: torch.device | str = "cpu") -> Iterator[None]:
    """Trace what happens inside into the file `path`, a Chrome trace.

    Nobody may listen to the phases at the same time. Names of hosts and of the file itself are left out.
    """
    activities = [ProfilerActivity.CPU]
    if torch.device(device).type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else it complains that there is no GPU
    track = Timeline(time.time_ns, lambda start, end: (end - start) / 1e6)
    with profile(activities=activities) as profiler, phases.listen(track):
        yield
        track.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    _complete(path, track)


def _complete(path: Path, track: Timeline) -> None:
    """Add the phases, on torch's time base, and leave out what names the machine."""
    tree: dict[str, Any] = json.loads(path.read_text())
    base = tree.get("baseTimeNanoseconds", 0)
    where = {"pid": _TRACK, "tid": 0}
    events = [{"ph": "M", "name": "process_name", **where, "args": {"name": _TRACK}}]
    events += [{"ph": "M", "name": "process_sort_index", **where, "args": {"sort_index": -1}}]
    for direction, phase, start, end in track.slices():
        span = {"ts": (start - base) / 1000, "dur": (end - start) / 1000}
        events.append({"ph": "X", "cat": _TRACK, "name": phase, **where, **span, "args": {"pass": direction}})
    tree["traceEvents"] += events
    for key in ("host_name", "traceName"):
        tree.pop(key, None)
    path.write_text(json.dumps(tree))


def of_rank(path: Path, rank: int, world: int) -> Path:
    """Each rank's own file: `trace.json` as `trace.rank1.json`; as it is with one rank."""
    return path if world == 1 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def trace_steps(path: Path, steps: dict[str, Callable[[], Any]], device: torch.device | str) -> None:
    """One call of each of `steps`, named, in one trace."""
    with traced(path, device):
        for name, step in steps.items():
            with record_function(name):
                step()


class StepTracer:
    """Traces some of a run's steps: gives the training loop a context for each.

    Args:
        first: the first step, counted from 1.
        last: the last one.
        path: the file.
    """

    def __init__(self, first: int, last: int, path: Path) -> None:
        self.first, self.last, self._path = first, last, path
        self._open = ExitStack()
        self.written: Path | None = None

    def __call__(self, step: int) -> AbstractContextManager[None]:
        """The context for optimiser step number `step`."""
        return self._step(step) if self.first <= step <= self.last else nullcontext()

    @contextmanager
    def _step(self, step: int) -> Iterator[None]:
        if self.written is None:
            self.written = self._path
            self._open.enter_context(traced(self.written, "cpu" if wants_cpu() else "cuda"))
        phases.turn(phases.FORWARD)
        with record_function(f"step {step}"):
            yield
        if step == self.last:
            self._open.close()

    def close(self) -> None:
        """The run is over, maybe before the last of the steps."""
        self._open.close()
