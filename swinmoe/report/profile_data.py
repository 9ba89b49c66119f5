"""Measurements of one or several profiles, read from their records, and what follows from them.

Definitions stand beside the properties; each is None where the records do not have what it is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from swinmoe.records import read_records
from swinmoe.report.interval import interval_name

Line = dict[str, Any]
WHATS = ("layer", "model", "exchange")
"""Kinds of measurements that a profile's page shows; tuners write others."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One way of doing something, and how long it took."""

    line: Line
    source: int
    """Number of the profile that it is of."""
    label: str
    """Its name, with the profile's where there are several."""
    baseline: Measured | None = None

    @property
    def what(self) -> str:
        """`layer`, `model` or `exchange`."""
        return str(self.line["what"])

    @property
    def variant(self) -> Mapping[str, Any]:
        """Its settings."""
        found: Mapping[str, Any] = self.line.get("variant") or {}
        return found

    @property
    def ms(self) -> float:
        """Median."""
        return float(self.line["ms"]["median"])

    @property
    def low(self) -> float:
        """Lower end of the median's interval."""
        return float(self.line["ms"].get("low", self.ms))

    @property
    def high(self) -> float:
        """Its upper end."""
        return float(self.line["ms"].get("high", self.ms))

    @property
    def interval(self) -> str:
        """What `low` and `high` are, and of how many rounds."""
        rounds = self.line["ms"].get("rounds")
        return f"{interval_name(rounds)}, {rounds} rounds" if rounds else "? rounds"

    @property
    def is_dense(self) -> bool:
        """A baseline of expert layers."""
        return self.variant.get("dispatcher") == "dense"

    @property
    def ratio(self) -> float | None:
        """Time over the baseline's."""
        return None if self.baseline is None else self.ms / self.baseline.ms

    @property
    def told_apart(self) -> bool:
        """The intervals of this and its baseline do not overlap."""
        other = self.baseline
        return other is not None and (self.low > other.high or self.high < other.low)

    @property
    def world(self) -> int:
        """Processes."""
        return int(self.variant.get("world") or 1)

    @property
    def rate(self) -> float | None:
        """Tokens per second of all ranks; of a model images."""
        images = self.line["ms"].get("images_per_second")
        if images is not None:
            return float(images)
        tokens = self.variant.get("tokens")
        return None if tokens is None else float(tokens) * self.world / (self.ms / 1000)

    @property
    def rate_unit(self) -> str:
        """Of `rate`."""
        return "images/s" if "images_per_second" in self.line["ms"] else "tokens/s"

    @property
    def phases(self) -> Mapping[str, Mapping[str, float]]:
        """Milliseconds of {pass: {phase}}."""
        found: Mapping[str, Mapping[str, float]] = self.line.get("phases") or {}
        return found

    @property
    def phase_gap(self) -> float | None:
        """(Sum of the phases − time without marks)/time without marks."""
        total = self.line.get("instrumented_ms")
        return None if total is None else float(total) / self.ms - 1

    def _rows(self, name: str) -> float | None:
        rows = self.line.get("rows") or {}
        value = rows.get(name)
        return None if self.is_dense or value is None else float(value)

    @property
    def drop_loss(self) -> float | None:
        """Share of choices that no expert computes: 1 − kept/routed."""
        routed, kept = self._rows("routed"), self._rows("kept")
        return 1 - kept / routed if routed and kept is not None else None

    @property
    def padding_waste(self) -> float | None:
        """Share of computed rows that are padding: 1 − kept/computed."""
        computed, kept = self._rows("computed"), self._rows("kept")
        return 1 - kept / computed if computed and kept is not None else None

    @property
    def imbalance_tax(self) -> float | None:
        """(Time − time with balance forced)/time with balance forced."""
        balanced = self.line.get("balanced_ms")
        return self.ms / float(balanced) - 1 if balanced else None

    @property
    def exposed(self) -> float | None:
        """Milliseconds in exchanges that the step waits for."""
        return _number(self.line.get("exposed_ms"))

    @property
    def hidden(self) -> float | None:
        """Milliseconds of the exchange alone that other work covered."""
        return _number(self.line.get("hidden_ms"))

    @property
    def alone(self) -> float | None:
        """Milliseconds of the same rows' exchange with nothing else going on."""
        return _number(self.line.get("exchange_ms"))

    @property
    def exposed_share(self) -> float | None:
        """Exposed communication over the instrumented step, whose part it is."""
        total = self.line.get("instrumented_ms")
        return self.exposed / float(total) if self.exposed is not None and total else None

    @property
    def useful(self) -> float | None:
        """Model FLOPs per second of a rank over the rate of a bare matrix product."""
        return _number((self.line.get("utilisation") or {}).get("model"))

    @property
    def busy(self) -> float | None:
        """The same with padding counted."""
        return _number((self.line.get("utilisation") or {}).get("hardware"))

    @property
    def flops(self) -> Mapping[str, float]:
        """model, hardware, dense_equivalent."""
        found: Mapping[str, float] = self.line.get("flops") or {}
        return found

    @property
    def memory(self) -> Mapping[str, float]:
        """Bytes by class, and `peak`."""
        found: Mapping[str, float] = self.line.get("memory") or {}
        return found

    @cached_property
    def capacity(self) -> float | None:
        """The capacity factor; infinite where nothing is dropped; None where there is none."""
        text = self.variant.get("capacity")
        if not text:
            return None
        if text == "dropless":
            return float("inf")
        try:
            return float(str(text).split()[-1])
        except ValueError:
            return None

    def settings(self, without: Sequence[str] = ()) -> dict[str, Any]:
        """The variant, apart from some keys; the capacity's kind stands for the capacity."""
        own = {key: value for key, value in self.variant.items() if key not in without}
        if "capacity" in self.variant and "capacity" in without:
            own["capacity kind"] = "bounded" if str(self.variant["capacity"]).startswith("bounded") else None
        return own


@dataclass(frozen=True)
class Profile:
    """One `profile` record."""

    name: str
    """Of its folder, or of the workload."""
    line: Line

    @property
    def environment(self) -> Mapping[str, Any]:
        """Machine and versions."""
        found: Mapping[str, Any] = self.line.get("environment") or {}
        return found


@dataclass(frozen=True)
class Profiles:
    """All that a page is about."""

    profiles: tuple[Profile, ...]
    measured: tuple[Measured, ...]
    fits: tuple[Line, ...]
    """`fit` records; `source` in each."""

    def of(self, *whats: str) -> list[Measured]:
        """Measurements of these kinds, in order."""
        return [m for m in self.measured if m.what in whats]


def has_profile(records: Sequence[Line]) -> bool:
    """Whether a page of a profile can be made of these."""
    return any(line["kind"] == "profile" and line.get("what") in WHATS for line in records)


def has_measurements(records: Sequence[Line]) -> bool:
    """Whether anything was measured: a profile that was interrupted early has a beginning alone."""
    return any(line["kind"] == "measurement" for line in records)


def experts_said(lines: Iterable[Line]) -> list[str]:
    """Who computes the experts of which step, where they are on a CPU."""
    steps: dict[str, list[str]] = {}
    for line in lines:
        taken = line.get("experts_in_kernel")
        if taken is not None:
            how = (
                "our kernel in C++"
                if taken
                else f"torch's operators, not our kernel ({line['experts_in_kernel_reason']})"
            )
            steps.setdefault(how, []).append(line["name"])
    alike = len(steps) == 1
    return [f"experts by {how}" + ("" if alike else f": {'; '.join(names)}") for how, names in steps.items()]


def read_profiles(paths: Sequence[Path]) -> Profiles:
    """Everything measured, of several records files: a world size each, say.

    Raises:
        CheckpointError: no records at one of `paths`, or a damaged line.
    """
    profiles: list[Profile] = []
    found: list[Measured] = []
    fits: list[Line] = []
    records = [(path, read_records(path)) for path in paths]
    several = sum(line["kind"] == "profile" for _, lines in records for line in lines) > 1
    for path, lines in records:
        own: list[Measured] = []
        for line in lines:
            if line["kind"] == "profile" and line.get("what") in WHATS:
                profiles.append(Profile(_unused(path.parent.name or "profile", profiles), line))
            elif line["kind"] == "measurement" and line.get("what") in WHATS and profiles and _timed(line):
                label = f"{line['name']} · {profiles[-1].name}" if several else str(line["name"])
                own.append(Measured(line, len(profiles) - 1, label))
            elif line["kind"] == "fit" and line.get("points") and profiles:
                fits.append(line | {"source": len(profiles) - 1})
        found += _with_baselines(own)
    return Profiles(tuple(profiles), tuple(found), tuple(fits))


def _with_baselines(own: Sequence[Measured]) -> list[Measured]:
    by_name = {(m.source, m.line["name"]): m for m in own}
    bases = [by_name.get((m.source, m.line.get("baseline"))) for m in own]
    return [m if base is None else replace(m, baseline=base) for m, base in zip(own, bases, strict=True)]


def _timed(line: Line) -> bool:
    return bool((line.get("ms") or {}).get("median"))


def _unused(name: str, taken: Sequence[Profile]) -> str:
    names = {profile.name for profile in taken}
    return next(n for n in (name, *(f"{name} {i}" for i in range(2, len(names) + 3))) if n not in names)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


SHORT = {
    "num_experts": "E{}",
    "top_k": "k{}",
    "world": "{} ranks",
    "ep_size": "ep {}",
    "local_size": "nodes of {}",
    "weight_group": "weights of {}",
    "chunks": "{} chunks",
    "tokens": "T{}",
    "dim": "D{}",
    "hidden": "F{}",
    "skew": "skew {}",
    "bytes": "bytes {}",
    "batch_size": "batch {}",
    "img_size": "{} px",
    "embed_dim": "C{}",
}
"""How a legend has a setting; one that is not here speaks for itself by its value, but for `key.of.run`."""


def words(settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Those settings as a legend has them."""
    shown = [(key, settings[key]) for key in keys if settings.get(key) is not None]
    forms = [SHORT.get(k, f"{k.rpartition('.')[2]} {{}}" if "." in k else "{}") for k, _ in shown]
    values = [f"{v:g}" if isinstance(v, float) else v for _, v in shown]
    return ", ".join(form.format(value) for form, value in zip(forms, values, strict=True)) or "all"


def grouped(measured: Sequence[Measured], without: Sequence[str]) -> dict[str, list[Measured]]:
    """Measurements that differ in `without` alone, by what tells the groups apart."""
    groups: dict[tuple[tuple[str, str], ...], tuple[Mapping[str, Any], list[Measured]]] = {}
    for m in measured:
        own = m.settings(without)
        key = tuple(sorted((name, repr(value)) for name, value in own.items() if value is not None))
        groups.setdefault(key, (own, []))[1].append(m)
    settings = [own for own, _ in groups.values()]
    for keys in (_differing(settings, missing=False), _differing(settings, missing=True)):
        named = {words(own, keys): group for own, group in groups.values()}
        if len(named) == len(groups):
            return named
    return {f"{words(own, keys)} #{i + 1}": group for i, (own, group) in enumerate(groups.values())}


def _differing(many: Sequence[Mapping[str, Any]], *, missing: bool) -> list[str]:
    """Keys whose values are not all alike, in order; a missing value is one of its own only if that is asked for."""
    keys = dict.fromkeys(key for one in many for key in one)
    values = {key: {repr(one.get(key)) for one in many if missing or one.get(key) is not None} for key in keys}
    return [key for key in keys if len(values[key]) > 1]
