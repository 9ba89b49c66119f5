"""The capacity tuner: curves over the factor, a factor for every layer, and the proof that it does what was asked.

The batches of every other step are for choosing, the rest for checking. Choosing for drops starts from the loads of a
dropless pass and repeats with the loads of the pass it has led to, because a choice dropped in one layer changes the
next layer's load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from swinmoe.config import CapacityPolicy
from swinmoe.profiling.clock import Timing, take_turns
from swinmoe.profiling.tune.batches import Steps, halves
from swinmoe.profiling.tune.choose import Asked, Point, broken, fastest_within
from swinmoe.profiling.tune.loads import Load, imbalance, least_factor
from swinmoe.profiling.tune.passes import Factor, Mode, Seen, Setting, Workbench, at_factor
from swinmoe.train.opened import Opened

FACTORS: tuple[Factor, ...] = (0.5, 0.625, 0.75, 1.0, 1.25, 1.5, 2.0, None)
LEVELS = (0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
"""Drop levels at which settings with a factor per layer are tried: each layer drops as much as the others."""
_REFINEMENTS = 4
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Verdict:
    """A recommendation, measured on batches it was not chosen on."""

    setting: Setting
    chosen: Seen
    """On the batches for choosing."""
    seen: Seen
    reference: Seen
    """Dropless on the same batches as `seen`."""
    timings: Mapping[str, Timing]
    """`recommended`, `dropless`, `now` (the model's own setting), in turns."""
    failures: tuple[str, ...]
    """What does not keep the constraint; empty: verified."""


@dataclass(frozen=True)
class Tuning:
    """What was found in one mode."""

    mode: Mode
    asked: Asked
    points: tuple[Point, ...]
    """Uniform factors, without and with batch priority."""
    layered: tuple[Point, ...]
    """Settings with a factor per layer."""
    loads: Mapping[str, Sequence[Load]]
    """Of the dropless pass over the batches for choosing."""
    verdict: Verdict
    own: Mapping[str, CapacityPolicy]
    """By layer, the capacity that the model has."""
    separate: bool
    """Whether choosing and checking had batches of their own: false where there is only one step."""
    ep_size: int
    """Ranks that share the experts: of these processes, or of the run that trained the model."""
    together: int
    """Neighbouring `loads` that meet at the same experts."""

    def expert_imbalance(self, layer: str) -> float:
        """Load of the busiest expert over the mean in one process's batch."""
        return imbalance(self.loads[layer])

    def rank_imbalance(self, layer: str) -> float | None:
        """Load of the busiest rank over the mean of those that share the experts; None where one has them all."""
        return imbalance(self.loads[layer], self.ep_size, self.together) if self.ep_size > 1 else None


def label(factor: Factor) -> str:
    """`1.25` or `dropless`."""
    return "dropless" if factor is None else f"{factor:g}"


def tune_capacity(
    opened: Opened,
    mode: Mode,
    steps: Steps,
    asked: Asked,
    *,
    factors: Sequence[Factor] = FACTORS,
    rounds: int = 7,
    tell: Tell = lambda text: None,
) -> Tuning:
    """Find a factor for every expert layer of a trained model, and check it. A collective call of the processes that
    share the model; all of them find the same.

    Args:
        opened: a sparse model.
        mode: whose capacity: training's or evaluation's.
        steps: batches as large as one process's; see `batches_for`.
        asked: the user's constraint.
        factors: uniform ones for the curves; the recommendation may not exceed their largest (None = dropless).
        rounds: of every timing.
        tell: what is being done.
    """
    separate = len(steps) > 1
    choosing, checking = (Workbench(opened, mode, batches) for batches in halves(steps))
    tell(f"{mode}: loads without drops")
    reference = choosing.look(choosing.uniform(None))
    settings = {
        f"{label(factor)}{', by priority' if priority else ''}": choosing.uniform(factor, priority)
        for priority in (False, True)
        for factor in factors
    }
    layered = _layered(choosing, reference, asked, factors, tell)
    points = _measure(choosing, settings | layered, rounds, tell)
    uniform, per_layer = points[: len(settings)], points[len(settings) :]
    setting, chosen = _recommend(choosing, asked, uniform, per_layer, reference)
    tell(f"{mode}: checking on other batches" if separate else f"{mode}: checking")
    verdict = _check(checking, asked, setting, chosen, rounds)
    choosing.forget_gradients()
    ep_size = _ep_size(opened)
    return Tuning(
        mode,
        asked,
        tuple(uniform),
        tuple(per_layer),
        reference.loads,
        verdict,
        choosing.own,
        separate,
        ep_size,
        _together(reference, ep_size, len(steps[0]) * opened.mesh.world, len(steps[::2])),
    )


def _ep_size(opened: Opened) -> int:
    """One process has all experts of a model that may have been trained otherwise."""
    trained = opened.source.run
    return trained.parallel.ep_size if opened.mesh.world == 1 and trained is not None else opened.mesh.ep_size


def _together(seen: Seen, ep_size: int, processes: int, steps: int) -> int:
    """Batches of an expert group; all of a step where the processes make up no whole groups, or some had no image."""
    of_step = len(next(iter(seen.loads.values()))) // steps
    return ep_size if of_step == processes and processes % ep_size == 0 else of_step


def _layered(
    bench: Workbench, reference: Seen, asked: Asked, factors: Sequence[Factor], tell: Tell
) -> dict[str, Setting]:
    """Settings in which every layer drops at most a level, each once; for a constraint on drops, that level only."""
    levels = LEVELS if asked.max_drop is None else (asked.max_drop,)
    found: dict[str, Setting] = {}
    for level in levels:
        tell(f"{bench.mode}: factors by layer for {100 * level:g} % drops")
        setting = factors_for(bench, reference.loads, level, factors)
        if setting not in found.values():
            found[f"by layer, {100 * level:g} % drops"] = setting
    return found


def factors_for(
    bench: Workbench, loads: Mapping[str, Sequence[Load]], max_drop: float, factors: Sequence[Factor]
) -> Setting:
    """The least factors with which every layer's drops are bounded by `max_drop` in the pass that they lead to.

    No drops at all means dropless: no factor found on some batches excludes them on others. Where the search does not
    settle, factors only grow, so it ends.
    """
    limited = [factor for factor in factors if factor is not None]
    most = max(limited) if limited and None not in factors else None
    if max_drop == 0 and None in factors:
        return bench.uniform(None)

    def least(loads: Mapping[str, Sequence[Load]]) -> dict[str, float]:
        bounded = {layer: at_factor(bench.own[layer], 1.0) for layer in loads}
        needs = {layer: least_factor(loads[layer], bounded[layer], max_drop) for layer in loads}
        return {layer: need if most is None else min(need, most) for layer, need in needs.items()}

    now = least(loads)
    for _ in range(_REFINEMENTS):
        again = least(bench.look(Setting(now, bench.batch_prioritized)).loads)
        if all(again[layer] <= now[layer] for layer in now):
            break
        now = {layer: max(now[layer], again[layer]) for layer in now}
    return Setting(now, bench.batch_prioritized)


def _measure(bench: Workbench, settings: Mapping[str, Setting], rounds: int, tell: Tell) -> list[Point]:
    seen = {}
    for number, (name, setting) in enumerate(settings.items(), 1):
        tell(f"{bench.mode}: {number} of {len(settings)}, {name}")
        seen[name] = bench.look(setting)
    tell(f"{bench.mode}: timing {len(settings)} settings, {rounds} rounds")
    timings = _time(bench, settings, rounds)
    return [Point(name, setting, seen[name], timings[name]) for name, setting in settings.items()]


def _time(bench: Workbench, settings: Mapping[str, Setting], rounds: int) -> dict[str, Timing]:
    steps = {name: partial(bench.step, setting) for name, setting in settings.items()}
    opened = bench.opened
    return take_turns(steps, rounds, group=opened.mesh.world_group, device=opened.device, warm_up=1)


def _recommend(
    bench: Workbench, asked: Asked, uniform: Sequence[Point], layered: Sequence[Point], reference: Seen
) -> tuple[Setting, Seen]:
    """The setting, with the model's own priority: that is not the tuner's to change."""
    if asked.max_drop is not None:
        (point,) = layered
        return point.setting, point.seen
    assert asked.within is not None
    own = [point for point in (*uniform, *layered) if point.setting.batch_prioritized == bench.batch_prioritized]
    best = fastest_within(own, reference, asked.within)
    if best is None:  # nothing fits: what comes closest, so that the check can say by how much it misses
        best = max(own, key=lambda point: point.seen.accuracy)
    return best.setting, best.seen


def _check(bench: Workbench, asked: Asked, setting: Setting, chosen: Seen, rounds: int) -> Verdict:
    seen, reference = bench.look(setting), bench.look(bench.uniform(None))
    three = {"recommended": setting, "dropless": bench.uniform(None), "now": bench.own_setting()}
    timings = _time(bench, three, rounds)
    return Verdict(setting, chosen, seen, reference, timings, tuple(broken(asked, seen, reference)))
