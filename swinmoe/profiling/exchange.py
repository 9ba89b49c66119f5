"""What the all-to-all of expert layers takes by itself: by message size and skew, in one stage or two, both ways.

Shapes: n ranks of a group, D width of a row; M (n, n) int64 on the host, M[s, d] rows that rank s has for rank d, its
own included; V = bytes of a rank's rows, V/n of them for each rank on average.

Bandwidths are as NCCL's tests have them: algbw = V/t, of all rows, those that stay included; busbw = algbw·(n − 1)/n,
what really leaves a rank of an even exchange. Where rows are uneven the busiest rank sets the time; what enters or
leaves it is said beside.

An exchange is one way: rows to the ranks of their experts. A layer's forward pass has two, and its backward pass two.
With 2DH rows are brought into the order in which they leave as a layer would have to; the flat exchange needs none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swinmoe.comm import all_reduce_max, take
from swinmoe.config import ParallelConfig
from swinmoe.config.profile_exchange import ExchangeSweepConfig, ExchangeWorkload
from swinmoe.errors import ConfigError
from swinmoe.moe import phases
from swinmoe.parallel import Mesh, make_mesh
from swinmoe.parallel.tokens_travel import Itinerary, TokensTravel
from swinmoe.profiling.clock import Step, Timing, meet, take_turns
from swinmoe.profiling.exchange_alone import bytes_sent
from swinmoe.profiling.link import Sample, fit_link
from swinmoe.profiling.trace import trace_steps

Line = dict[str, Any]
"""A `measurement` or `fit` record, see `swinmoe.records.record`."""
FORWARD, BACKWARD = phases.FORWARD, phases.BACKWARD
LONG_ENOUGH_MS = 2.0
"""Shorter exchanges are repeated within a turn: ranks leave the barrier before it some tenths of it apart."""
_MOST_CALLS = 64
_WHAT = "profiling an exchange"


@dataclass
class _Case:
    """One direction of one exchange, ready to be run."""

    name: str
    workload: ExchangeWorkload
    direction: str
    mesh: Mesh
    matrix: Tensor
    step: Step
    calls: int = 1
    """Exchanges within a turn."""


def profile_exchange(
    config: ExchangeSweepConfig,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
    trace: Path | None = None,
) -> Iterator[tuple[str, Line]]:
    """(kind, line) of a `measurement` of each exchange, by rising size, and then of each `fit`; a collective call.

    Exchanges of one size take turns. Fits take the even ones of each kind, where there are at least three sizes.

    Args:
        config: what to measure.
        device: where rows are.
        say: told what is being done, and which combinations cannot be.
        trace: a file for one more of each of the exchanges of the smallest size, by name.

    Raises:
        ConfigError: there is one process only, or no combination can be.
    """
    world = make_mesh(ParallelConfig()).world
    if world == 1:
        raise ConfigError(
            "an exchange needs at least two processes and this is one; start several, e.g. launch/local.sh --processes "
            "2 profile exchange"
        )
    workloads, refused = config.workloads()
    for why in refused:
        say(f"left out: {why}")
    bench = _Bench(config, torch.device(device), world)
    lines: list[Line] = []
    failures: list[ConfigError] = []
    for size in dict.fromkeys(w.bytes for w in workloads):
        cases: list[_Case] = []
        for workload in workloads:
            if workload.bytes != size:
                continue
            try:
                cases += bench.cases(workload)
            except ConfigError as error:
                if str(error) not in map(str, failures):
                    failures.append(error)
                    say(f"left out: {error}")
        if cases:
            say(f"{len(cases)} exchanges of {bytes_said(size)} take turns, {config.rounds} rounds")
            own = bench.measure(cases)
            if trace is not None and not lines:
                trace_steps(trace, {case.name: partial(_in_its_phase, case) for case in cases}, device)
            lines += own
            yield from (("measurement", line) for line in own)
    if not lines:
        raise failures[0]
    yield from (("fit", line) for line in fits(lines))


def bytes_said(size: float) -> str:
    """`64 KiB`."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.4g} {unit}"
    return f"{size:.0f} B"


def skewed_rows(ranks: int, each: int, skew: float) -> Tensor:
    """M, equal rows: of `ranks`·`each` rows, a share `skew` for rank 0 and the rest evenly, to within one row."""
    total = ranks * each
    wanted = torch.full((ranks,), (1 - skew) * each, dtype=torch.float64)
    wanted[0] += skew * total
    ends = wanted.cumsum(0).round().long()
    ends[-1] = total
    return torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64)).repeat(ranks, 1)


class _Bench:
    def __init__(self, config: ExchangeSweepConfig, device: torch.device, world: int) -> None:
        self.config, self.device, self.world = config, device, world

    def cases(self, w: ExchangeWorkload) -> list[_Case]:
        """Both directions of one exchange."""
        parallel = w.parallel(self.world)
        mesh = make_mesh(parallel)
        group = mesh.token_group(parallel)
        if group.local_size in (1, group.size):
            raise ConfigError(
                f"exchange=2dh with nodes of {group.local_size} among {group.size} ranks has one stage; give a "
                "local_size between, which divides the ranks, or use exchange=flat"
            )
        each = max(1, round(w.bytes / (4 * self.config.dim)))
        matrix = skewed_rows(group.size, each, w.skew)
        way = TokensTravel(group, slices=1, chunks=w.chunks, payload=w.payload, batch=None, layer=_WHAT)
        plan = way.prepare(matrix[group.rank].to(self.device), None).plan
        sent = torch.randn(group.size * each, self.config.dim).to(self.device)
        # Two graphs: one is built anew with each forward pass, the other is run backwards again and again.
        steps: dict[str, Step] = {FORWARD: lambda: _travel(sent, plan, w.payload)}
        if self.config.backward:
            source = sent.clone().requires_grad_()
            arrived = _travel(source, plan, w.payload)
            slope = torch.randn_like(arrived)
            steps[BACKWARD] = lambda: torch.autograd.grad(arrived, source, slope, retain_graph=True)
        return [_Case(f"{self._name(w)}, {d}", w, d, mesh, matrix, step) for d, step in steps.items()]

    def _name(self, w: ExchangeWorkload) -> str:
        words = [w.exchange, bytes_said(w.bytes)]
        words += [f"skew {w.skew:g}"] * (len(self.config.skew) > 1 or w.skew > 0)
        words += [f"nodes of {w.local_size}"] * (w.local_size is not None)
        words += [f"chunks {w.chunks}"] * (len(self.config.chunks) > 1 or w.chunks > 1)
        words += [w.payload] * (len(self.config.payload) > 1 or w.payload != "full")
        words += [f"{w.ep_size or self.world} ranks"] * (len(self.config.ep_size) > 1)
        return " ".join(words[:2]) + "".join(f", {word}" for word in words[2:])

    def measure(self, cases: list[_Case]) -> list[Line]:
        world = cases[0].mesh.world_group
        for case in cases:
            case.calls = _calls(case.step, world)
        arms = {case.name: _repeated(case.step, case.calls) for case in cases}
        taken = take_turns(arms, self.config.rounds, group=world, device=self.device)
        names = {case.name for case in cases}
        return [self._line(case, taken[case.name], names) for case in cases]

    def _line(self, case: _Case, timing: Timing, names: set[str]) -> Line:
        w, ranks = case.workload, case.mesh.ep_size
        timing = Timing(tuple(ms / case.calls for ms in timing.ms))
        row = self.config.dim * (2 if w.payload == "bf16" else 4)
        volume = int(case.matrix[0].sum()) * row
        seconds = timing.median / 1000
        plain = f"{self._name(replace(w, exchange='flat', local_size=None, chunks=1, payload='full', skew=0.0))}"
        baseline = f"{plain}, {case.direction}"
        return {
            "what": "exchange",
            "name": case.name,
            "variant": asdict(w)
            | {
                "ep_size": ranks,
                "world": case.mesh.world,
                "local_size": self._local_size(case),
                "direction": case.direction,
                "dim": self.config.dim,
            },
            "baseline": baseline if baseline in names and baseline != case.name else None,
            "ms": timing.as_json(),
            "calls": case.calls,
            "message_bytes": volume / ranks,
            "bytes_sent": bytes_sent(case.step, case.mesh),
            "busiest_bytes": _busiest(case.matrix) * row,
            "algbw": volume / seconds,
            "busbw": volume / seconds * (ranks - 1) / ranks,
            "ranks": ranks,
        }

    def _local_size(self, case: _Case) -> int | None:
        return case.mesh.token_group(case.workload.parallel(self.world)).local_size


def _busiest(matrix: Tensor) -> int:
    """Rows that enter or leave the rank at which most do."""
    others = matrix - torch.diag(matrix.diagonal())
    return int(torch.maximum(others.sum(0), others.sum(1)).max())


def _travel(rows: Tensor, plan: Itinerary, payload: str) -> Tensor:
    """Rows to their ranks, as `TokensTravel` has it for the way out."""
    light = rows.to(torch.bfloat16) if payload == "bf16" else rows
    parts = take(light, plan.departure).split([chunk.rows for chunk in plan.chunks])
    flights = [chunk.journey.depart(part, _WHAT) for chunk, part in zip(plan.chunks, parts, strict=True)]
    flights = [chunk.journey.change(flight, _WHAT) for chunk, flight in zip(plan.chunks, flights, strict=True)]
    arrived = [chunk.journey.arrive(flight) for chunk, flight in zip(plan.chunks, flights, strict=True)]
    return (arrived[0] if len(arrived) == 1 else torch.cat(arrived)).to(rows.dtype)


def _in_its_phase(case: _Case) -> None:
    """One exchange for a trace, a phase of its own that begins when the ranks have met, as timed ones do."""
    phases.turn(case.direction)
    meet(case.mesh.world_group)
    phases.enter("exchange_out")
    case.step()
    phases.enter(phases.OTHER)


def _calls(step: Step, group: Any) -> int:
    """How many exchanges make a turn long enough; the same on all ranks."""
    step()
    start = time.perf_counter()
    for _ in range(3):
        step()
    each = torch.tensor((time.perf_counter() - start) / 3 * 1000, dtype=torch.float64)
    slowest = float(all_reduce_max(each, group, "comparing times"))
    return max(1, min(_MOST_CALLS, math.ceil(LONG_ENOUGH_MS / max(slowest, 1e-6))))


def _repeated(step: Step, calls: int) -> Step:
    def turn() -> None:
        for _ in range(calls):
            step()

    return turn


def fits(lines: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    """A `fit` for each kind of even exchange of which there are three sizes, and one for flat ones of all group sizes.

    Args:
        lines: `measurement` records of exchanges.
    """
    kinds: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for line in lines:
        v = line["variant"]
        if v["skew"] == 0:
            key = tuple(v[name] for name in ("exchange", "local_size", "chunks", "payload", "direction"))
            kinds.setdefault((*key, v["ep_size"]), []).append(line)
            if v["exchange"] == "flat":
                kinds.setdefault((*key, None), []).append(line)
    for (exchange, local, chunks, payload, direction, ranks), own in kinds.items():
        groups = {line["ranks"] for line in own}
        if len({line["message_bytes"] for line in own}) < 3 or (ranks is None and len(groups) == 1):
            continue
        samples = [_sample(line) for line in own]
        link, first = fit_link(samples), samples[0]
        variant = {"exchange": exchange, "local_size": local, "chunks": chunks, "payload": payload}
        # of 2DH's two stages, with fewer and larger messages than it has rows for one rank
        size = first.size / own[0]["message_bytes"]
        half = link.half(first.messages, first.rounds) / size
        yield {
            "what": "exchange",
            "name": _fit_name(variant, direction, ranks),
            "variant": variant | {"direction": direction, "ep_size": ranks, "world": own[0]["variant"]["world"]},
            "latency_seconds": link.latency,
            "bandwidth": link.bandwidth if math.isfinite(link.bandwidth) else None,
            "half_message": link.half_message,
            "half_bandwidth_bytes": half if ranks is not None and math.isfinite(half) else None,
            "latency_error": link.latency_error,
            "bandwidth_error": link.bandwidth_error,
            "typical_error": link.typical_error,
            "worst_error": link.worst_error,
            "points": [
                {
                    "name": line["name"],
                    "message_bytes": line["message_bytes"],
                    "ranks": line["ranks"],
                    "seconds": line["ms"]["median"] / 1000,
                    "predicted": line["ms"]["median"] / 1000 * (1 + error),
                    "error": error,
                }
                for line, error in zip(own, link.errors, strict=True)
            ],
        }


def _sample(line: Mapping[str, Any]) -> Sample:
    """What a fit sees of an exchange: chunks are parts of a message."""
    ranks, local, seconds = line["ranks"], line["variant"]["local_size"], line["ms"]["median"] / 1000
    if local is None:
        return Sample(ranks - 1, line["message_bytes"], seconds)
    # local_size neighbours exchange V/local_size bytes each, then one rank of each node V/nodes
    nodes, rows = ranks // local, ranks * line["message_bytes"]
    messages = local - 1 + nodes - 1
    return Sample(messages, rows * ((local - 1) / local + (nodes - 1) / nodes) / messages, seconds, rounds=2)


def _fit_name(variant: Mapping[str, Any], direction: str, ranks: int | None) -> str:
    words = [variant["exchange"]]
    words += [f"nodes of {variant['local_size']}"] * (variant["local_size"] is not None)
    words += [f"chunks {variant['chunks']}"] * (variant["chunks"] > 1)
    words += [variant["payload"]] * (variant["payload"] != "full")
    words += ["all ranks together" if ranks is None else f"{ranks} ranks", direction]
    return ", ".join(words)
