"""What a person watches while arms train: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from swinmoe.train.arm import Arm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Live progress of several arms. `show=False` (other ranks, tests) keeps the accounts and prints nothing."""

    def __init__(self, show: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.show = show
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._waited = self._worked = 0.0
        self._last_line: dict[str, float] = {}

    @contextmanager
    def open(self, arms: Sequence[tuple[str, int | None]]) -> Iterator[None]:
        """Show one bar per (name, steps) while the block runs."""
        if not (self.show and self.console.is_terminal):
            yield
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Bars(*columns, console=self.console) as self._bars:
            self._tasks = {name: self._bars.add_task(name, total=steps, text="") for name, steps in arms}
            yield
        self._bars = None

    def stepped(self, *, waited: float, worked: float) -> None:
        """Account for one step: seconds spent waiting for data and computing."""
        self._waited += waited
        self._worked += worked

    def wait_share(self) -> float | None:
        """Share of the time spent waiting for data so far."""
        total = self._waited + self._worked
        return self._waited / total if total > 0 else None

    def advance(self, arm: Arm) -> None:
        """The arm has taken a step."""
        if self._bars is not None:
            self._bars.update(self._tasks[arm.name], completed=arm.step)

    def logged(self, arm: Arm, numbers: Mapping[str, Any]) -> None:
        """New numbers of an arm: in its bar, or as a line at most every ten seconds."""
        text = _text(numbers)
        if self._bars is not None:
            self._bars.update(self._tasks[arm.name], completed=arm.step, text=text)
        elif self.show and time.monotonic() - self._last_line.get(arm.name, 0.0) > SECONDS_BETWEEN_LINES:
            self._last_line[arm.name] = time.monotonic()
            total = f"/{arm.length.steps}" if arm.length.steps is not None else ""
            self.say(f"{arm.name:>10} step {arm.step}{total}  {text}")

    def evaluated(self, arm: Arm, found: Mapping[str, Any]) -> None:
        """An evaluation is in."""
        numbers = f"accuracy {100 * found['accuracy']:.2f} %, loss {found['loss']:.4f}"
        self.say(f"{arm.name:>10} step {arm.step}: {numbers} on {found['count']} images")

    def say(self, text: str) -> None:
        """One line for the person watching."""
        if self.show:
            self.console.print(text, markup=False)


def _text(numbers: Mapping[str, Any]) -> str:
    parts = [f"loss {numbers['loss']:.4f}", f"acc {100 * numbers['accuracy']:.1f} %"]
    if numbers.get("images_per_second"):
        parts.append(f"{numbers['images_per_second']:.0f} img/s")
    routing = numbers.get("routing") or {}
    if routing:
        drops = [layer["drop_fraction"] for layer in routing.values()]
        parts.append(f"dropped {100 * sum(drops) / len(drops):.1f} %")
    return "  ".join(parts)
