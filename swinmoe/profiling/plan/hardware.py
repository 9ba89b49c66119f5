"""A machine in figures, each with its source: what products, memory and links do per second.

Figures come as YAML: `h100`, `a100` and `cpu` with this package, others from a file, which `swinmoe plan --calibrate`
writes. A link's time for n messages of s bytes is latency + n·(s + half_message)/bandwidth: a message of `half_message`
bytes travels at half the bandwidth, B(s) = B·s/(s + half_message).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from swinmoe.config.io import build, read_yaml, to_tree
from swinmoe.errors import ConfigError, did_you_mean
from swinmoe.profiling.plan.cost import KINDS, Cost

Precision = Literal["fp32", "bf16", "fp16", "fp64"]
WIDTH: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
"""Bytes of an element that enters a product."""
NEVER = 1e18
"""Bytes per second of a link that nobody measured, or whose time does not depend on size."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between two ranks, in one direction."""

    latency: Figure
    """Seconds before anything arrives, once for each collective (and for each round of an all-reduce)."""
    bandwidth: Figure
    """Bytes per second of one rank, for large messages."""
    half_message: Figure
    """Bytes of a message at which half of that is reached."""

    @property
    def measured(self) -> bool:
        """False where nobody sent anything: a calibration on one process."""
        return self.latency.value > 0 or self.bandwidth.value < NEVER

    def seconds(self, messages: float, size: float) -> float:
        """`messages` of `size` bytes each, one after another; nothing if there are none."""
        if messages <= 0:
            return 0.0
        return self.latency.value + messages * (size + self.half_message.value) / self.bandwidth.value

    def at(self, size: float) -> float:
        """Bytes per second that messages of `size` bytes reach."""
        return self.bandwidth.value * size / (size + self.half_message.value) if size > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Per second: FLOP by precision, bytes by kind of work (`Cost`)."""

    fp32: Figure
    bf16: Figure
    fp16: Figure
    products: Figure
    copy: Figure
    norm: Figure
    softmax: Figure
    activation: Figure
    route: Figure
    rows: Figure
    update: Figure
    fp64: Figure | None = None
    """None: half of fp32."""


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Processes on one machine at the same time."""

    processes: int
    slowdown: Figure
    """How many times slower each of them computes than alone."""
    inside: Link | None = None
    """Between so many: with more processes than cores, who is waited for may not be running. None: as the machine's."""
    shared: Link | None = None
    """The same for rows through shared memory."""
    lockstep: Figure | None = None
    """How many times slower again where they wait for each other every few milliseconds, as in expert layers: the next
    piece begins when the slowest has ended this one. None: nobody measured it, and 1 is taken."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of machine, in nodes of `processes_per_node` ranks."""

    name: str
    device: Literal["cuda", "cpu"]
    processes_per_node: int
    memory: Figure
    """Bytes of one rank."""
    reserved: Figure
    """Of these, bytes that nothing of ours can use: context, libraries, fragments."""
    rates: Rates
    call: Figure
    """Seconds that each operator takes whatever its size."""
    inside: Link
    """Within a node."""
    between: Link
    """Between nodes."""
    overlap: Figure
    """Share of communication that can hide behind computation that does not wait for it, 0 to 1."""
    shared: Link | None = None
    """Within a node, rows of an all-to-all where processes share memory (`comm.neighbours`); None: as `inside`."""
    fused_attention: bool = False
    """Attention weights never reach memory."""
    sharing: tuple[Sharing, ...] = field(default=())
    """Empty: every rank has a device of its own."""

    def __post_init__(self) -> None:
        for name, figure in _figures(self):
            low_open = name.startswith("rates.") or name.endswith((".bandwidth", ".slowdown", ".lockstep", "memory"))
            if not figure.value < float("inf") or figure.value < 0 or (low_open and figure.value == 0):
                raise ConfigError(
                    f"hardware {self.name!r}: {name}={figure.value:g} must be {'above' if low_open else 'at least'} 0 "
                    "and finite"
                )
        if self.processes_per_node < 1 or self.overlap.value > 1:
            raise ConfigError(
                f"hardware {self.name!r}: processes_per_node={self.processes_per_node} must be at least 1, "
                f"overlap={self.overlap.value:g} at most 1"
            )

    def check_links(self, ranks: int) -> None:
        """`ConfigError` if so many ranks would send over a link that nobody measured."""
        inside = ranks > 1 and self.processes_per_node > 1 and not self.inside.measured
        between = ranks > self.processes_per_node and not self.between.measured
        if inside or between:
            raise ConfigError(
                f"hardware {self.name!r} does not say how {ranks} ranks send to each other: nobody measured its links; "
                "calibrate on several processes (swinmoe plan --calibrate FILE --processes N, or under a launcher), or "
                f"fill in {'inside' if inside else 'between'}: latency in seconds, bandwidth in bytes per second"
            )

    @property
    def neighbours(self) -> Link:
        """What rows of an all-to-all travel by that stays in a node."""
        return self.shared or self.inside

    def flops_per_second(self, precision: str) -> float:
        """What large products reach."""
        rates = self.rates
        if precision == "fp64":
            return rates.fp32.value / 2 if rates.fp64 is None else rates.fp64.value
        figure: Figure = getattr(rates, precision)
        return figure.value

    def seconds(self, cost: Cost, precision: str, processes: int = 1) -> float:
        """Time of some work on one rank of a node on which `processes` ranks work."""
        traffic: list[Figure] = [getattr(self.rates, kind) for kind in KINDS[1:-1]]
        rates = (self.flops_per_second(precision), *(figure.value for figure in traffic))
        alone = sum(count / rate for count, rate in zip(cost.counts[:-1], rates, strict=True))
        return (alone + cost.calls * self.call.value) * self.slowdown(processes)

    def slowdown(self, processes: int) -> float:
        """How many times slower than alone a rank computes when so many share a machine; linear between figures."""
        known = sorted((s.processes, s.slowdown.value) for s in self.sharing)
        if not known:
            return 1.0
        if processes > known[-1][0]:  # cores are shared evenly from here on
            return known[-1][1] * processes / known[-1][0]
        return _between(known, processes)

    def lockstep(self, processes: int) -> float:
        """How many times slower again where so many ranks of a machine wait for each other all the time."""
        known = sorted((s.processes, s.lockstep.value) for s in self.sharing if s.lockstep is not None)
        return _between([(1, 1.0), *known], processes)  # one by itself waits for nobody

    def among(self, processes: int) -> Hardware:
        """The same machine with the links that it has when so many processes share a node."""
        known = sorted((s for s in self.sharing if s.inside is not None), key=lambda s: s.processes)
        if not known:
            return self
        like = next((s for s in known if s.processes >= processes), known[-1])
        return replace(self, inside=like.inside or self.inside, shared=like.shared)

    def scaled(self, name: str, factor: float, *kinds: str) -> Hardware:
        """The same machine, called `name`, `factor` times slower at `kinds` of work; without any, at all of them."""
        rates = {
            kind: Figure(value=figure.value / factor, source=f"{figure.source}; scaled by {1 / factor:.3g}")
            for kind in (kinds or (*_precisions(self.rates), *KINDS[1:-1]))
            if (figure := getattr(self.rates, kind)) is not None
        }
        call = self.call if kinds else replace(self.call, value=self.call.value * factor)
        return replace(self, name=name, rates=replace(self.rates, **rates), call=call)

    def as_yaml(self) -> str:
        """The text of a file that `load_hardware` reads."""
        return str(yaml.safe_dump(_dense(to_tree(self)), sort_keys=False, width=110))


def _between(known: list[tuple[int, float]], processes: int) -> float:
    """What holds for so many, linear between the numbers of processes that are known; beyond them, that of the last."""
    below = [pair for pair in known if pair[0] <= processes] or known[:1]
    above = [pair for pair in known if pair[0] >= processes] or known[-1:]
    (low, value), (high, other) = below[-1], above[0]
    return value if high == low else value + (other - value) * (processes - low) / (high - low)


def _precisions(rates: Rates) -> tuple[str, ...]:
    return tuple(name for name in WIDTH if getattr(rates, name) is not None)


def _dense(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _dense(value) for key, value in tree.items() if value is not None}
    return [_dense(value) for value in tree] if isinstance(tree, list) else tree


def _figures(part: Any, prefix: str = "") -> list[tuple[str, Figure]]:
    """(`rates.copy`, figure) of every figure."""
    found: list[tuple[str, Figure]] = []
    for item in fields(part):
        value = getattr(part, item.name)
        values = value if isinstance(value, tuple) else (value,)
        for inner in values:
            if isinstance(inner, Figure):
                found.append((prefix + item.name, inner))
            elif is_dataclass(inner):
                found += _figures(inner, f"{prefix}{item.name}.")
    return found


def known_hardware() -> list[str]:
    """Names of the descriptions that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _folder().iterdir() if p.name.endswith(".yaml"))


def _folder() -> Any:
    return resources.files("swinmoe.profiling.plan") / "hardware"


def load_hardware(name: str) -> Hardware:
    """A description by name, or from a YAML file.

    Raises:
        ConfigError: neither a known name nor a file; a key that does not exist, a figure without a source.
    """
    if name in known_hardware():
        tree = yaml.safe_load((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
        return build(Hardware, tree)
    if not Path(name).is_file():
        raise ConfigError(
            f"--hardware {name}: neither a file nor one of {known_hardware()}{did_you_mean(name, known_hardware())}; "
            "describe a machine in YAML, or measure this one with swinmoe plan --calibrate FILE"
        )
    return build(Hardware, read_yaml(name))
