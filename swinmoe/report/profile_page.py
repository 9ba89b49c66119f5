"""`write_profile_report`: one self-contained HTML page from the records of one profile or of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from swinmoe.report import profile_plots as plots
from swinmoe.report.page import Picture, add_picture, drawn, flat, templates, write_whole
from swinmoe.report.profile_data import Measured, Profiles, experts_said, read_profiles
from swinmoe.report.profile_headline import cards, findings
from swinmoe.report.theme import DARK, LIGHT, Theme
from swinmoe.report.wording import scaled
from swinmoe.version import __version__

DIRECTIONS = ("forward", "backward", "update")


@dataclass(frozen=True)
class ProfileReport:
    """What `write_profile_report` left behind."""

    html: Path
    headline: str


class _Album:
    """Pictures of a page."""

    def __init__(self) -> None:
        self.pictures: list[Picture] = []

    def add(self, title: str, make: Callable[[Theme], Figure]) -> Picture:
        return add_picture(self.pictures, title, title, partial(drawn, make))

    def bars(self, title: str, measured: Sequence[Measured], make: Callable[..., Figure]) -> list[Picture]:
        """As many pictures as hold all of `measured`; `make(part, theme=...)` draws one."""
        size = plots.BARS
        return [
            self.add(title, partial(make, measured[first : first + size])) for first in range(0, len(measured), size)
        ]


def write_profile_report(records: Sequence[Path], output_dir: Path) -> ProfileReport:
    """Write `report.html` into `output_dir`; sections of what was not measured are left out.

    Args:
        records: records files, e.g. one for each number of processes.
        output_dir: made if it is not there.

    Raises:
        CheckpointError: no records at one of `records`, or a damaged line.
    """
    found = read_profiles(records)
    said = findings(found)
    html = Path(output_dir) / "report.html"
    text = templates(autoescape=True).get_template("profile.html.j2").render(_context(found, said))
    write_whole(html, text.encode())
    return ProfileReport(html, " ".join(said))


def _context(found: Profiles, said: Sequence[str]) -> dict[str, Any]:
    steps, album = found.of("layer", "model"), _Album()
    wasteful = [m for m in steps if not m.is_dense and m.drop_loss is not None]
    whats = list(dict.fromkeys(str(profile.line["what"]) for profile in found.profiles))
    return {
        "title": ", ".join(profile.name for profile in found.profiles) or "profile",
        "whats": whats,
        "findings": said,
        "cards": cards(found),
        "facts": _facts(found),
        "steps": steps,
        "rate_unit": steps[0].rate_unit if steps else "",
        "exchanges": found.of("exchange"),
        "fits": found.fits,
        "phases": _phases(steps, album),
        "gaps": [abs(m.phase_gap) for m in steps if m.phase_gap is not None and not m.is_dense],
        "throughput": _throughput(steps, album),
        "bandwidth": _bandwidth(found, album),
        "scaling": _scaling(steps, album),
        "communication": _communication(steps, album),
        "wasteful": wasteful,
        "travelled": any(m.exposed is not None for m in wasteful),
        "counted": [m for m in steps if m.flops],
        "memory": _memory(steps, album),
        "profiles": [
            (p.name, p.line.get("command") or "", flat(p.line.get("workload") or {}), flat(p.environment))
            for p in found.profiles
        ],
        "bytes_said": plots.bytes_said,
        "scaled": scaled,
        "light": LIGHT,
        "dark": DARK,
        "version": __version__,
    }


def _facts(found: Profiles) -> list[tuple[str, str]]:
    """On what it was measured."""
    rows = [
        ("processes", "world_size"),
        ("device", "device"),
        ("processor", "cpu"),
        ("threads", "torch_threads"),
        ("torch", "torch"),
    ]
    facts = []
    for said, key in rows:
        values = dict.fromkeys(str(p.environment[key]) for p in found.profiles if p.environment.get(key) is not None)
        if values:
            facts.append((said, ", ".join(values)))
    for said in experts_said(m.line for m in found.of("layer", "model")):
        facts.append(("experts", said.removeprefix("experts ")))
    begun = [str(p.line["time"]) for p in found.profiles if p.line.get("time")]
    return facts + ([("begun", min(begun))] if begun else [])


def _phases(steps: Sequence[Measured], album: _Album) -> list[Picture]:
    """The passes of the same steps side by side, all to one scale."""
    own = [m for m in steps if m.phases]
    widest = max((sum(parts.values()) for m in own for parts in m.phases.values()), default=0.0)
    by_pass = []
    for direction in DIRECTIONS:
        found = [m for m in own if m.phases.get(direction)]
        make = partial(_phases_of, direction=direction, widest=widest)
        by_pass.append(album.bars(f"Phases, {direction}", found, make))
    return [picture for row in zip_longest(*by_pass) for picture in row if picture is not None]


def _phases_of(measured: Sequence[Measured], theme: Theme, direction: str, widest: float) -> Figure:
    return plots.phases_figure(measured, direction, widest, theme)


def _throughput(steps: Sequence[Measured], album: _Album) -> list[Picture]:
    """A picture for each unit, where capacities differ."""
    out = []
    for unit in dict.fromkeys(m.rate_unit for m in steps):
        series = plots.capacity_series([m for m in steps if m.rate_unit == unit])
        if series:
            out.append(album.add("Throughput over capacity", partial(plots.capacity_figure, series)))
    return out


def _bandwidth(found: Profiles, album: _Album) -> list[Picture]:
    out = []
    exchanges = found.of("exchange")
    for direction in DIRECTIONS:
        even = [m for m in exchanges if m.variant.get("direction") == direction and not m.variant.get("skew")]
        if len({m.line["message_bytes"] for m in even}) > 1:
            title = f"Bandwidth over message size, {direction}"
            out.append(album.add(title, partial(plots.bandwidth_figure, even, found.fits)))
    forward = [m for m in exchanges if m.variant.get("direction") == "forward"]
    if len({m.variant.get("skew") for m in forward}) > 1:
        out.append(album.add("Time over skew, forward", partial(plots.skew_figure, forward)))
    return out


def _scaling(steps: Sequence[Measured], album: _Album) -> list[tuple[Picture, list[tuple[str, list[Any]]]]]:
    """(picture, rows of (name, [(processes, rate, efficiency)]))."""
    out = []
    for unit in dict.fromkeys(m.rate_unit for m in steps):
        series = plots.scaling_series([m for m in steps if m.rate_unit == unit and m.rate is not None])
        if series:
            rows = [(name, _efficiency(own)) for name, own in series.items()]
            out.append((album.add("Throughput over processes", partial(plots.scaling_figure, series)), rows))
    return out


def _efficiency(own: Sequence[Measured]) -> list[Any]:
    first = (own[0].rate or 0.0) / own[0].world
    return [(m.world, m.rate, (m.rate or 0.0) / (first * m.world)) for m in own]


def _communication(steps: Sequence[Measured], album: _Album) -> list[Picture]:
    own = [m for m in steps if m.exposed is not None]
    widest = max((max((m.exposed or 0.0) + (m.hidden or 0.0), m.alone or 0.0) for m in own), default=0.0)
    make = partial(_communication_of, widest=widest)
    return album.bars("Exposed and hidden communication", own, make)


def _communication_of(measured: Sequence[Measured], theme: Theme, widest: float) -> Figure:
    return plots.communication_figure(measured, widest, theme)


def _memory(steps: Sequence[Measured], album: _Album) -> list[Picture]:
    own = [m for m in steps if m.memory]
    widest = max((float(m.memory.get("peak", 0.0)) for m in own), default=0.0)
    return album.bars("Memory by class", own, partial(_memory_of, widest=widest))


def _memory_of(measured: Sequence[Measured], theme: Theme, widest: float) -> Figure:
    return plots.memory_figure(measured, widest, theme)
