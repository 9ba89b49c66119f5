"""What one expert layer's step costs beside a dense MLP of equal active FLOPs, and where its time goes.

Layers of the same width take turns with their baseline and a bare matrix product, so that all of it is of the same
minutes. Each layer appears several times in a round: as it is, with its phases marked, with balance forced, and its
exchange alone. A collective call from beginning to end.

A training step is gradients given back (`zero_grad`), forward, and backward of a given slope and the balance loss. So
every step makes new gradients, in memory that the allocator finds; on a CPU experts' are made where the last ones were
(`swinmoe.moe.gradient_buffers`), as in training, and the baseline's are not.
Sums of gradients over replicas are left out: they are a model's, and `profile model` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swinmoe.config.profile import LayerSweepConfig, LayerWorkload
from swinmoe.errors import BackendUnavailableError, ConfigError
from swinmoe.moe import MoEMlp, phases
from swinmoe.parallel import Mesh, apply_expert_parallel, global_sum, make_mesh, no_sync
from swinmoe.profiling.breakdown import Watched, in_exchange, mean_breakdown
from swinmoe.profiling.clock import Step, Timing, take_turns
from swinmoe.profiling.exchange_alone import bytes_sent, compare_alone, exchange_alone, watch_passages
from swinmoe.profiling.flops import Rows, layer_flops, mlp_flops
from swinmoe.profiling.forced import ForcedRouter
from swinmoe.profiling.gemm import gemm_rate, gemm_steps
from swinmoe.profiling.memory import peak_memory, worst_memory
from swinmoe.profiling.trace import trace_steps

Line = dict[str, Any]
"""A `measurement` record, see `swinmoe.records.record`."""
AT_ONCE = 6
"""Layers that take turns together; more would fill the memory, and rounds would grow long."""


@dataclass
class _Case:
    """One workload, ready to be run."""

    name: str
    workload: LayerWorkload
    mesh: Mesh
    layer: MoEMlp
    router: ForcedRouter
    step: Step
    balanced: Step
    alone: Step | None
    watched: Watched
    rows: Rows = field(default_factory=lambda: Rows(0, 0, 0))
    slots: int | None = None


def profile_layer(
    config: LayerSweepConfig,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
    trace: Path | None = None,
) -> Iterator[Line]:
    """The measurements of all workloads of `config`, with those of their baselines before them.

    Args:
        config: what to measure.
        device: where.
        say: told what is being done, and which combinations cannot be.
        trace: a file for one more step of each of the first layers that take turns.

    Raises:
        ConfigError: no combination can be, or none on this number of processes.
        BackendUnavailableError: the only dispatcher asked for is not here.
    """
    workloads, refused = config.workloads()
    left_out: dict[str, None] = {}

    def leave_out(why: str) -> None:
        if why not in left_out:
            say(f"left out: {why}")
        left_out[why] = None

    for why in refused:
        leave_out(why)
    bench = _Bench(config, torch.device(device), say)
    done = 0
    failure: ConfigError | BackendUnavailableError | None = None
    names = _names(workloads)
    groups: dict[tuple[Any, ...], list[LayerWorkload]] = {}
    for workload in workloads:
        groups.setdefault(_baseline_key(workload), []).append(workload)
    for group in groups.values():
        for first in range(0, len(group), AT_ONCE):
            cases = []
            for workload in group[first : first + AT_ONCE]:
                try:
                    cases.append(bench.case(names[workload], workload))
                except (ConfigError, BackendUnavailableError) as error:
                    failure = error
                    leave_out(str(error))
            if cases:
                yield from bench.measure(cases, first // AT_ONCE)
                if trace is not None and not done:
                    trace_steps(trace, {case.name: case.step for case in cases}, device)
            done += len(cases)
    if not done and failure is not None:
        raise failure


def _baseline_key(workload: LayerWorkload) -> tuple[Any, ...]:
    """What the dense MLP beside a layer depends on."""
    w = workload
    return (w.tokens, w.dim, w.hidden, w.top_k, w.precision)


_WORDS = {
    "tokens": "T{}",
    "dim": "D{}",
    "hidden": "F{}",
    "ep_size": "ep {}",
    "weight_group": "weights of {}",
    "exchange": "{}",
    "local_size": "nodes of {}",
    "chunks": "{} chunks",
    "payload": "{} sent",
    "skew": "skew {:g}",
    "precision": "{}",
}
"""How a value that is not the usual one is named."""


def _names(workloads: Iterable[LayerWorkload]) -> dict[LayerWorkload, str]:
    """A name for each: layout, experts, choices, capacity; of the rest what is not usual; sizes where they differ."""
    workloads, usual = list(workloads), LayerWorkload()
    sizes = {key for key in ("tokens", "dim", "hidden") if len({getattr(w, key) for w in workloads}) > 1}
    names = {}
    for w in workloads:
        words = [f"{w.dispatcher} E{w.experts} k{w.top_k} {w.capacity}"]
        for key, word in _WORDS.items():
            value = getattr(w, key)
            if key in sizes or (key not in ("tokens", "dim", "hidden") and value != getattr(usual, key)):
                words.append(word.format(value))
        names[w] = ", ".join(words)
    return names


class _Bench:
    def __init__(self, config: LayerSweepConfig, device: torch.device, say: Callable[[str], None]) -> None:
        self.config, self.device, self.say = config, device, say

    # ------------------------------------------------------------------------------------------------------- building

    def case(self, name: str, workload: LayerWorkload) -> _Case:
        w, training = workload, self.config.backward
        mesh = make_mesh(w.parallel(), w.experts)
        layer = MoEMlp(w.moe(), dim=w.dim, hidden_dim=w.hidden, seed=self.config.seed).to(self.device)
        apply_expert_parallel(layer, mesh)
        layer.train(training)
        router = ForcedRouter(layer.router, layer.cfg.router.normalize_gates)
        layer.add_module("router", router)
        chosen = None if w.skew == "router" else float(w.skew)
        x, slope = self._tokens(w)
        run = self._layer_step(layer, w, x, slope)

        def step(skew: float | None = chosen) -> None:
            router.skew = skew
            run()

        watched = Watched(step, self.device)
        case = _Case(name, w, mesh, layer, router, step, lambda: step(0.0), None, watched)
        router.skew = chosen
        self._count(case, x)
        if w.ep_size > 1:
            case.alone = exchange_alone(watch_passages(step, [layer]))
        return case

    def _tokens(self, w: LayerWorkload) -> tuple[Tensor, Tensor]:
        """Tokens, different on each rank, and the slope of the loss at the layer's output."""
        rank = make_mesh(w.parallel(), w.experts).rank
        generator = torch.Generator().manual_seed(1000 * self.config.seed + rank)
        x = torch.randn(w.tokens, w.dim, generator=generator).to(self.device)
        slope = torch.randn(w.tokens, w.dim, generator=generator).to(self.device)
        return x.requires_grad_(self.config.backward), slope

    def _autocast(self, w: LayerWorkload) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if w.precision == "bf16" else nullcontext()

    def _layer_step(self, layer: MoEMlp, w: LayerWorkload, x: Tensor, slope: Tensor) -> Step:
        if not self.config.backward:

            def infer() -> None:
                with torch.no_grad(), self._autocast(w):
                    layer(x)

            return infer

        def train() -> None:
            layer.zero_grad()
            with no_sync(layer):
                with self._autocast(w):
                    y, stats = layer(x)
                phases.turn(phases.BACKWARD)
                torch.autograd.backward([y, stats.loss], [slope.to(y.dtype), None])
                phases.enter(phases.OTHER)

        return train

    def _dense_step(self, w: LayerWorkload) -> tuple[Step, nn.Module, Tensor]:
        hidden = w.top_k * w.hidden
        dense = nn.Sequential(nn.Linear(w.dim, hidden), nn.GELU(), nn.Linear(hidden, w.dim)).to(self.device)
        x, slope = self._tokens(w)

        def infer() -> None:
            with torch.no_grad(), self._autocast(w):
                dense(x)

        def train() -> None:
            dense.zero_grad()
            with self._autocast(w):
                y = dense(x)
            y.backward(slope.to(y.dtype))

        return (train if self.config.backward else infer), dense, x

    def _count(self, case: _Case, x: Tensor) -> None:
        """Rows of a step, over all ranks."""
        layer, mesh = case.layer, case.mesh
        with torch.no_grad(), self._autocast(case.workload):
            _, _, route, stats = layer.assign(x.detach(), None)
        routed, kept = (int(n) for n in global_sum(torch.stack([stats.routed.sum(), stats.kept.sum()]), mesh))
        case.slots = route.slots
        computed = kept if route.slots is None else mesh.world * layer.num_experts * route.slots
        case.rows = Rows(routed, kept, computed)

    # ------------------------------------------------------------------------------------------------------ measuring

    def measure(self, cases: list[_Case], number: int) -> Iterator[Line]:
        first = cases[0].workload
        mesh = cases[0].mesh
        dense_step, dense, dense_x = self._dense_step(first)
        baseline = f"dense T{first.tokens} D{first.dim} F{first.top_k * first.hidden}"
        baseline += f" {first.precision}" * (first.precision != "fp32") + f" #{number + 1}" * (number > 0)
        gemms = gemm_steps(first.tokens, first.dim, first.top_k * first.hidden, first.precision, self.device)
        arms: dict[str, Step] = {baseline: dense_step} | {f"gemm {name}": g.step for name, g in gemms.items()}
        for case in cases:
            arms[case.name] = case.step
            arms[f"{case.name}: phases"] = case.watched
            if case.workload.skew != 0:
                arms[f"{case.name}: balanced"] = case.balanced
            if case.alone is not None:
                arms[f"{case.name}: exchange"] = case.alone
        self.say(
            f"{len(arms)} steps take turns, {self.config.rounds} rounds: {baseline}; {'; '.join(c.name for c in cases)}"
        )
        taken = take_turns(arms, self.config.rounds, group=mesh.world_group, device=self.device)
        rate = gemm_rate(gemms, taken)
        yield self._dense_line(baseline, first, mesh, taken[baseline], rate, dense_step, dense, dense_x)
        for case in cases:
            yield self._line(case, baseline, taken, rate)

    def _dense_line(
        self,
        name: str,
        w: LayerWorkload,
        mesh: Mesh,
        timing: Timing,
        rate: float,
        step: Step,
        dense: nn.Module,
        x: Tensor,
    ) -> Line:
        passes = 3 if self.config.backward else 1
        rows = mesh.world * w.tokens * w.top_k
        flops = passes * mlp_flops(rows, w.dim, w.hidden)
        used = flops / mesh.world / (timing.median / 1000) / rate
        variant = {"dispatcher": "dense", "num_experts": 0, "top_k": w.top_k, "world": mesh.world, "ep_size": 1}
        return {
            "what": "layer",
            "name": name,
            "variant": variant | self._shape(w),
            "baseline": None,
            "ms": timing.as_json(),
            "rows": asdict(Rows(rows, rows, rows)),
            "flops": dict.fromkeys(("model", "hardware", "dense_equivalent"), flops),
            "gemm_flops_per_second": rate,
            "utilisation": {"model": used, "hardware": used},
            "bytes_sent": 0,
            "ranks": 1,
            "memory": worst_memory(peak_memory(step, dense, inputs=[x]), mesh),
        }

    def _shape(self, w: LayerWorkload) -> Line:
        return {
            "tokens": w.tokens,
            "dim": w.dim,
            "hidden": w.hidden,
            "precision": w.precision,
            "backward": self.config.backward,
        }

    def _line(self, case: _Case, baseline: str, taken: dict[str, Timing], rate: float) -> Line:
        w, mesh, timing = case.workload, case.mesh, taken[case.name]
        breakdown = mean_breakdown(case.watched, taken[f"{case.name}: phases"], mesh)
        balanced = taken.get(f"{case.name}: balanced", timing if w.skew == 0 else None)
        flops = layer_flops(
            case.rows,
            tokens=mesh.world * w.tokens,
            dim=w.dim,
            hidden=w.hidden,
            experts=w.experts,
            slots=case.slots,
            backward=self.config.backward,
            masks=w.dispatcher == "gshard",
        )
        seconds = timing.median / 1000
        line: Line = {
            "what": "layer",
            "name": case.name,
            "variant": self._variant(case),
            "baseline": baseline,
            "ms": timing.as_json(),
            "phases": breakdown,
            "instrumented_ms": sum(sum(own.values()) for own in breakdown.values()),
            "exposed_ms": None,
            "hidden_ms": None,
            "exchange_ms": None,
            "exchange_bytes": None,
            "balanced_ms": None if balanced is None else balanced.median,
            "rows": asdict(case.rows),
            "flops": flops.as_json(),
            "gemm_flops_per_second": rate,
            "utilisation": {
                "model": flops.model / mesh.world / seconds / rate,
                "hardware": flops.hardware / mesh.world / seconds / rate,
            },
            "bytes_sent": bytes_sent(case.step, mesh),
            "bandwidth": None,
            "ranks": mesh.ep_size,
        } | _in_kernel(case)
        if case.alone is not None:
            timed = taken[f"{case.name}: exchange"]
            line |= compare_alone(case.alone, timed, in_exchange(breakdown), mesh)
        x, slope = self._tokens(w)
        step = self._layer_step(case.layer, w, x, slope)
        case.step()  # sets the router's skew as the workload has it
        step()  # gradients of the tokens exist
        line["memory"] = worst_memory(peak_memory(step, case.layer, inputs=[x, slope]), mesh)
        return line

    def _variant(self, case: _Case) -> Line:
        w = case.workload
        taken, _ = case.layer.dispatcher_taken()
        return {
            "dispatcher": taken,
            "num_experts": w.experts,
            "top_k": w.top_k,
            "capacity": w.capacity,
            "ep_size": w.ep_size,
            "weight_group": w.weight_group,
            "world": case.mesh.world,
            "chunks": w.chunks,
            "exchange": w.exchange,
            "payload": w.payload,
            "skew": w.skew,
        } | self._shape(w)


def _in_kernel(case: _Case) -> Line:
    """Whether experts take our kernel in C++, and why not; None where there is none to take."""
    why: str | None = case.layer.experts.why_no_kernel()
    if case.workload.precision != "fp32":
        why = f"it takes float32 alone, and precision={case.workload.precision}"
    if case.layer.experts.fc1_weight.device.type != "cpu":
        why = None
    return {"experts_in_kernel": None if why is None else not why, "experts_in_kernel_reason": why or None}
