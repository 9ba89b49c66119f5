"""Ways of running a model's experts on given ranks, and the order in which they are tried.

One choice after another, each with the winners of those before: who shares experts and what travels; the layout of
rows; one exchange or two stages; in how many parts. A way replaces the one before only if it was faster in so many
rounds that chance is no explanation.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from swinmoe.config import RunConfig
from swinmoe.config.checks import divisors
from swinmoe.config.io import with_overrides
from swinmoe.errors import ConfigError
from swinmoe.profiling.clock import Timing, median_interval

CHUNKS = (1, 2, 4)


@dataclass(frozen=True)
class Way:
    """What the tuner may change. Results stay what they are, up to rounding."""

    dispatcher: str
    ep_size: int
    weight_group: int = 1
    exchange: Literal["flat", "2dh"] = "flat"
    local_size: int | None = None
    chunks: int = 1

    @staticmethod
    def of(run: RunConfig) -> Way:
        """That of a sparse run."""
        assert run.model.moe is not None
        own = run.parallel
        return Way(run.model.moe.dispatcher, own.ep_size, own.weight_group, own.exchange, own.local_size, own.chunks)

    @property
    def overrides(self) -> dict[str, Any]:
        """Keys of a run; `parallel.payload` is among them where no token travels, and is `full` there."""
        parallel = asdict(self)
        dispatcher = parallel.pop("dispatcher")
        if self.token_group == 1:
            parallel["payload"] = "full"  # rounding is refused where nothing could be rounded
        return {"parallel": parallel, "model": {"moe": {"dispatcher": dispatcher}}}

    @property
    def token_group(self) -> int:
        """Ranks among which tokens travel."""
        return self.ep_size // self.weight_group

    def applied(self, run: RunConfig) -> RunConfig:
        """`run` in this way.

        Raises:
            ConfigError: the run's experts cannot be spread like this.
        """
        return with_overrides(run, self.overrides)

    def __str__(self) -> str:
        if self.ep_size == 1:
            return f"ep_size 1, {self.dispatcher}"
        travels = (
            "tokens" if self.weight_group == 1 else "weights" if self.token_group == 1 else f"w{self.weight_group}"
        )
        words = [f"ep_size {self.ep_size}", travels, self.dispatcher]
        words += [f"2dh in nodes of {self.local_size or 'a machine'}"] * (self.exchange == "2dh")
        words += [f"{self.chunks} chunks"] * (self.chunks > 1)
        return ", ".join(words)


Measure = Callable[[Mapping[str, RunConfig]], Mapping[str, Timing]]
"""Times of runs, by name, taken in turns."""


@dataclass(frozen=True)
class Trial:
    """One choice: what was tried, in turns, and what came of it."""

    choice: str
    before: Way
    tried: tuple[tuple[Way, Timing], ...]
    after: Way


def search(
    run: RunConfig,
    world: int,
    measure: Measure,
    *,
    dispatchers: Sequence[str] = ("ragged", "padded"),
    ep_sizes: Sequence[int] | None = None,
) -> list[Trial]:
    """Try ways of running the sparse `run` on `world` ranks; the last trial's `after` is the one to take.

    Args:
        run: whose own way is the first to be beaten, where it is possible on these ranks.
        world: ranks.
        measure: of runs, in turns.
        dispatchers: layouts to try besides the run's own.
        ep_sizes: to try; None = all that divide `world` and fit the experts.

    Raises:
        ConfigError: none of `ep_sizes` is possible.
    """
    best = _first(run, world, ep_sizes)
    trials: list[Trial] = []
    for choice, ways in (
        ("ranks and what travels", lambda way: _spreads(run, way, world, ep_sizes)),
        ("layout", lambda way: (replace(way, dispatcher=name) for name in dispatchers)),
        ("exchange", lambda way: _exchanges(run, way)),
        ("chunks", lambda way: (replace(way, chunks=n) for n in CHUNKS if way.token_group > 1)),
    ):
        others = list(dict.fromkeys(way for way in ways(best) if way != best))
        if not others:
            continue
        timings = measure({str(way): way.applied(run) for way in (best, *others)})
        tried = tuple((way, timings[str(way)]) for way in (best, *others))
        after = _winner(tried)
        trials.append(Trial(choice, best, tried, after))
        best = after
    if not trials:  # nothing to choose from
        alone = measure({str(best): best.applied(run)})
        trials.append(Trial("nothing", best, ((best, alone[str(best)]),), best))
    return trials


def ratio(timing: Timing, over: Timing) -> tuple[float, float, float]:
    """Median of the rounds' ratios, and its 95 % interval: rounds are paired, the machine's drift cancels."""
    ratios = [a / b for a, b in zip(timing.ms, over.ms, strict=True)]
    low, high = median_interval(ratios)
    return statistics.median(ratios), low, high


def _winner(tried: Sequence[tuple[Way, Timing]]) -> Way:
    """The first, unless others were faster beyond doubt: then the fastest of these."""
    (best, own), *others = tried
    compared = [(ratio(timing, own), way) for way, timing in others]
    faster = [(middle, way) for (middle, _, high), way in compared if high < 1]
    return min(faster, key=lambda pair: pair[0])[1] if faster else best


def _first(run: RunConfig, world: int, ep_sizes: Sequence[int] | None) -> Way:
    """The run's own way, or the nearest that these ranks allow."""
    own = Way.of(run)
    if possible(run, own, world) and (ep_sizes is None or own.ep_size in ep_sizes):
        return own
    plain = Way(own.dispatcher, ep_size=1)
    found = list(_spreads(run, plain, world, ep_sizes))
    if not found:
        raise ConfigError(
            f"no ep_size of {list(ep_sizes or divisors(world))} is possible on {world} process(es) with this model; "
            f"use divisors of {world} that divide its number of experts, or are multiples of it"
        )
    return found[0]


def _spreads(run: RunConfig, way: Way, world: int, ep_sizes: Sequence[int] | None) -> Iterator[Way]:
    for ep in divisors(world) if ep_sizes is None else ep_sizes:
        for group in divisors(ep):
            new = Way(way.dispatcher, ep, group)
            if possible(run, new, world):
                yield new


def _exchanges(run: RunConfig, way: Way) -> Iterator[Way]:
    """Flat, and two stages with every size of node that leaves both stages something to do."""
    yield replace(way, exchange="flat", local_size=None)
    for local in divisors(way.ep_size):
        if way.weight_group < local < way.ep_size and local % way.weight_group == 0:
            yield replace(way, exchange="2dh", local_size=local)


def possible(run: RunConfig, way: Way, world: int) -> bool:
    """Whether the sparse `run` can be run in this way on `world` ranks."""
    if world % way.ep_size:
        return False
    try:
        way.applied(run)
    except ConfigError:
        return False
    return True
