"""What a run's training or inference steps cost beside its dense twin's, and where the time goes.

Shapes: B images of this rank and micro-batch, C channels, H height, W width.

The model is the run's own, spread as the run spreads it, with its optimiser; images are random numbers, already where
they are needed, so that loading does not count. Learning rates, that of balancing biases too, are next to nothing:
weights, and with them loads, stay what they are from round to round. A collective call from beginning to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swinmoe.config import RunConfig
from swinmoe.config.io import to_tree, with_overrides
from swinmoe.data import Batch
from swinmoe.errors import BackendUnavailableError, ConfigError
from swinmoe.models.attention import WindowAttention
from swinmoe.models.mlp import Mlp
from swinmoe.moe import RoutingStats, phases
from swinmoe.parallel import Mesh, make_mesh
from swinmoe.profiling.breakdown import Watched, in_exchange, mean_breakdown
from swinmoe.profiling.clock import Step, Timing, take_turns
from swinmoe.profiling.exchange_alone import bytes_sent, compare_alone, exchange_alone, watch_passages
from swinmoe.profiling.forced import ForcedRouter
from swinmoe.profiling.gemm import gemm_rate, gemm_steps
from swinmoe.profiling.memory import peak_memory, worst_memory
from swinmoe.profiling.model_flops import count_rows, model_flops, summed
from swinmoe.profiling.model_variant import variant_of
from swinmoe.profiling.trace import trace_steps
from swinmoe.runtime import make_accelerator
from swinmoe.train import Arm, Length, make_arm
from swinmoe.train.place import place
from swinmoe.train.session import why_no_expert_kernel

Line = dict[str, Any]
"""A `measurement` record, see `swinmoe.records.record`."""
MODEL_PHASES = ("attention", "mlp", phases.OPTIMIZER)
_STILL = {"optim": {"base_lr": 1e-12}, "schedule": {"min_lr": 0.0, "warmup_lr": 0.0, "warmup_steps": 0}}

_STILL_BIAS = {"model": {"moe": {"router": {"bias_update_rate": 1e-30}}}}
"""Of a sum with a gate's probability nothing is left."""


@dataclass
class _Subject:
    """One model, ready to step."""

    name: str
    arm: Arm
    step: Step
    watched: Watched
    routers: list[ForcedRouter]
    batches: list[Batch]
    alone: Step | None
    """The exchanges of a step by themselves, where experts are spread."""
    varied: Mapping[str, Any]
    """See `profile_model`."""


def profile_model(
    runs: Mapping[str, RunConfig],
    device: torch.device | str = "cpu",
    *,
    backward: bool = True,
    rounds: int = 15,
    say: Callable[[str], None] = lambda text: None,
    trace: Path | None = None,
    varied: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[Line]:
    """The measurements of `runs`, each after that of its dense twin.

    Args:
        runs: by name; a sparse run is followed by its own twin with `model.moe: null`.
        device: where.
        backward: training steps with their optimiser's; false: forward passes of one training batch.
        rounds: times that each step takes its turn.
        say: told what is being done, and which of several runs cannot be.
        trace: a file for one more step of each model of the first run that can be.
        varied: by a run's name, settings that tell it from others, as `key.of.run`: value.

    Raises:
        ConfigError: no run can be, by its config or as its batch gives some process no image.
        BackendUnavailableError: no run can be, as something is not installed.
    """
    bench = _Bench(torch.device(device), backward, rounds, say)
    failure: ConfigError | BackendUnavailableError | None = None
    done = 0
    for name, run in runs.items():
        accelerator = None
        try:
            accelerator = make_accelerator(run.train.precision, timeout_minutes=run.parallel.timeout_minutes)
            pair = bench.pair(name, run, accelerator, (varied or {}).get(name, {}))
        except (ConfigError, BackendUnavailableError) as error:
            failure = error
            if len(runs) > 1:
                say(f"left out: {name}: {error}")
        else:
            yield from bench.measure(pair, run, trace if not done else None)
            del pair  # else it would be there beside the next one
            done += 1
        finally:
            if accelerator is not None:
                accelerator.free_memory()  # it keeps every model that it has prepared
    if failure is not None and not done:
        raise failure


class _Bench:
    def __init__(self, device: torch.device, backward: bool, rounds: int, say: Callable[[str], None]) -> None:
        self.device, self.backward, self.rounds, self.say = device, backward, rounds, say

    def pair(self, name: str, run: RunConfig, accelerator: Any, varied: Mapping[str, Any]) -> list[_Subject]:
        """The model of `run`, after its twin if it is sparse."""
        pair = [self._subject(name, run, accelerator, varied)]
        if run.model.moe is not None:
            pair.insert(0, self._subject(f"{name}: dense twin", without_experts(run), accelerator, varied))
        return pair

    def measure(self, pair: list[_Subject], run: RunConfig, trace: Path | None) -> Iterator[Line]:
        """Their measurements."""
        mesh = pair[0].arm.mesh
        dim = run.model.embed_dim * 2 ** (len(run.model.depths) // 2)
        tokens = len(pair[0].batches[0]) * prod(run.model.img_size) // prod(run.model.patch_size)
        gemms = gemm_steps(tokens, dim, int(dim * run.model.mlp_ratio), run.train.precision, self.device)
        arms: dict[str, Step] = {f"gemm {key}": gemm.step for key, gemm in gemms.items()}
        for subject in pair:
            arms[subject.name] = subject.step
            arms[f"{subject.name}: phases"] = subject.watched
            if subject.routers:
                arms[f"{subject.name}: balanced"] = _balanced(subject)
            if subject.alone is not None:
                arms[f"{subject.name}: exchange"] = subject.alone
        self.say(f"{len(arms)} steps take turns, {self.rounds} rounds: {'; '.join(s.name for s in pair)}")
        with ExitStack() as marked:
            for subject in pair:
                marked.enter_context(marks(subject.arm.raw))
            taken = take_turns(arms, self.rounds, group=mesh.world_group, device=self.device)
            rate = gemm_rate(gemms, taken)
            for subject in pair:
                yield self._line(subject, taken, rate, None if subject is pair[0] else pair[0].name)
            if trace is not None:
                trace_steps(trace, {subject.name: subject.step for subject in pair}, self.device)

    def _subject(
        self, name: str, run: RunConfig, accelerator: Any, varied: Mapping[str, Any] | None = None
    ) -> _Subject:
        run = still(run)
        mesh = make_mesh(run.parallel, run.model.moe.num_experts if run.model.moe else None)
        arm = make_arm(name, run, mesh, accelerator, Length(steps=10**9), 10**9)
        layers, routers = list(arm.raw.moe_layers().values()), []
        for layer in layers:
            forced = ForcedRouter(layer.router, layer.cfg.router.normalize_gates)
            layer.add_module("router", forced)
            routers.append(forced)
        batches = [place(batch, self.device, run.train.precision) for batch in random_batches(run, mesh)]
        step = self._step(arm, batches)
        alone = exchange_alone(watch_passages(step, layers)) if mesh.ep_size > 1 and layers else None
        return _Subject(name, arm, step, Watched(step, self.device), routers, batches, alone, varied or {})

    def _step(self, arm: Arm, batches: list[Batch]) -> Step:
        if self.backward:
            return lambda: arm.train_step(batches)
        arm.raw.eval()

        def infer() -> None:
            with torch.inference_mode(), arm.autocast():
                for batch in batches:
                    arm.raw(batch.images)

        return infer

    def _routing(self, subject: _Subject) -> dict[str, RoutingStats]:
        """What one micro-batch's routing is."""
        arm = subject.arm
        arm.raw.train(self.backward)
        with torch.no_grad(), arm.autocast():
            routing: dict[str, RoutingStats] = arm.raw(subject.batches[0].images).routing
        return routing

    def _line(self, subject: _Subject, taken: Mapping[str, Timing], rate: float, baseline: str | None) -> Line:
        arm, mesh, timing = subject.arm, subject.arm.mesh, taken[subject.name]
        run, seconds = arm.run, timing.median / 1000
        breakdown = mean_breakdown(subject.watched, taken[f"{subject.name}: phases"], mesh, MODEL_PHASES)
        balanced = taken.get(f"{subject.name}: balanced")
        routing = self._routing(subject)
        rows = count_rows(arm.raw.moe_layers(), routing, mesh, training=self.backward)
        flops = model_flops(arm.counts, rows, run, backward=self.backward)
        images = run.train.batch_size
        memory = peak_memory(
            subject.step,
            arm.raw,
            optimizer=arm.optimizer if self.backward else None,
            inputs=[batch.images for batch in subject.batches],
        )
        why_no_kernel = why_no_expert_kernel(arm) if arm.device.type == "cpu" else None
        line: Line = {
            "what": "model",
            "name": subject.name,
            "variant": variant_of(run, mesh, self.backward, subject.varied),
            "run": to_tree(run),
            "baseline": baseline,
            "ms": timing.as_json() | {"p95": timing.percentile(95), "images_per_second": images / seconds},
            "phases": breakdown,
            "instrumented_ms": sum(sum(own.values()) for own in breakdown.values()),
            "exposed_ms": None,
            "hidden_ms": None,
            "exchange_ms": None,
            "exchange_bytes": None,
            "balanced_ms": None if balanced is None else balanced.median,
            "rows": asdict(summed(rows)) if routing else None,
            "flops": flops,
            "gemm_flops_per_second": rate,
            "utilisation": {key: flops[key] / mesh.world / seconds / rate for key in ("model", "hardware")},
            "bytes_sent": bytes_sent(subject.step, mesh),
            "bandwidth": None,
            "ranks": mesh.ep_size if routing else 1,
            "memory": worst_memory(memory, mesh),
            "experts_in_kernel": None if why_no_kernel is None else not why_no_kernel,
            "experts_in_kernel_reason": why_no_kernel or None,
        }
        if subject.alone is not None:
            line |= compare_alone(subject.alone, taken[f"{subject.name}: exchange"], in_exchange(breakdown), mesh)
        return line


def _balanced(subject: _Subject) -> Step:
    """The step with every layer's load forced to balance."""

    def step() -> None:
        for router in subject.routers:
            router.skew = 0.0
        try:
            subject.step()
        finally:
            for router in subject.routers:
                router.skew = None

    return step


def without_experts(run: RunConfig) -> RunConfig:
    """The dense twin of `run`."""
    return with_overrides(run, {"model": {"moe": None}})


def still(run: RunConfig) -> RunConfig:
    """`run` with learning rates of next to nothing, so that weights and loads stay what they are and its steps the same
    work."""
    balances = run.model.moe is not None and run.model.moe.router.bias_update_rate > 0
    return with_overrides(run, _STILL | (_STILL_BIAS if balances else {}))


def random_batches(run: RunConfig, mesh: Mesh) -> list[Batch]:
    """This rank's micro-batches of one step: images of random numbers with random labels."""
    parts, (rank, world) = run.train.accumulation, (mesh.rank, mesh.world)
    whole = run.train.batch_size // parts
    size = whole * (rank + 1) // world - whole * rank // world
    if whole < world:
        raise ConfigError(
            f"train.batch_size={run.train.batch_size} in train.accumulation={parts} micro-batches gives some of the "
            f"{world} processes no image; use at least {parts * world}"
        )
    generator = torch.Generator().manual_seed(1000 * run.seed + rank)
    model = run.model
    return [
        Batch(
            torch.randn(size, model.in_chans, *model.img_size, generator=generator),
            torch.randint(max(1, model.num_classes), (size,), generator=generator),
            None,
            torch.arange(size),
        )
        for _ in range(parts)
    ]


@contextmanager
def marks(model: nn.Module) -> Iterator[None]:
    """Within it, attention and dense MLPs are phases of their own."""
    handles = []
    for module in model.modules():
        phase = {WindowAttention: "attention", Mlp: "mlp"}.get(type(module))
        if phase is not None:
            mark = _Mark(phase)
            handles += [module.register_forward_pre_hook(mark.before), module.register_forward_hook(mark.after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Mark:
    """Borders around a module, whose first argument and result are tensors."""

    def __init__(self, phase: str) -> None:
        self.phase, self.outside = phase, phases.OTHER

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        self.outside = phases.current()
        return (phases.border(inputs[0], self.outside, self.phase), *inputs[1:])

    def after(self, module: nn.Module, inputs: tuple[Any, ...], result: Tensor) -> Tensor:
        return phases.border(result, self.phase, self.outside)
