"""The gradient proof: training on a mesh against training on one process, step by step on the same batches.

The mesh runs what `swinmoe train` runs, an `Arm` with its DDP, clipping, optimiser and average. The other side is
`OneProcess`, on rank 0, which shares none of that and takes its expert layers from the oracle.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swinmoe.config import ParallelConfig, RunConfig
from swinmoe.errors import ConfigError
from swinmoe.models import SwinTransformer
from swinmoe.parallel import (
    Mesh,
    gather_full,
    global_sum,
    is_cut,
    is_expert_parameter,
    local_part,
    make_mesh,
    take_local,
    use_exchange,
)
from swinmoe.runtime import make_accelerator
from swinmoe.train import Arm, Length, make_arm
from swinmoe.verify.one_process import OneProcess, Step, Tensors, stirred
from swinmoe.verify.proof import TOLERANCE, ParallelProof
from swinmoe.verify.setting import batches_of, part_of, provable, shares_of

PRECISION = {torch.float64: "fp64", torch.float32: "fp32"}
STEPS = 10
OnStep = Callable[[int], None]


def verify_parallel(
    run: RunConfig,
    *,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    ways: Sequence[ParallelConfig] = (),
    on_step: OnStep | None = None,
) -> ParallelProof:
    """Train `run` for a few steps on the mesh of this job and on one process, and compare; a collective call.

    Images are noise, 3 per rank and micro-batch, split equally at even steps and unequally at odd ones, where one rank
    has none. Weights are moved away from their initial values, so that every parameter has a gradient to compare.

    Args:
        run: model, losses, optimiser, accumulation and `parallel` count; data, schedule and length do not.
        steps: optimiser steps.
        dtype: float64, or float32 to see what precision training has.
        tolerance: largest relative difference of a proven mesh; None = `TOLERANCE` of the dtype.
        ways: how tokens and weights travel, taken in turn from step to step on the one mesh; none = `run.parallel`.
        on_step: called on every rank after each step with the number of steps done.

    Raises:
        ConfigError: another dtype, or a mesh that does not fit model or processes.
    """
    if dtype not in PRECISION:
        raise ConfigError(f"cannot verify in {dtype}; use torch.float64, or torch.float32 to see its precision")
    accelerator = make_accelerator(PRECISION[dtype], timeout_minutes=run.parallel.timeout_minutes)
    moe = run.model.moe
    mesh = make_mesh(run.parallel, moe.num_experts if moe else None)
    run, set_aside = provable(run, world=mesh.world, steps=steps, precision=PRECISION[dtype])
    mesh = replace(mesh, config=run.parallel)
    arm = make_arm("verify", run, mesh, accelerator, Length(steps=steps), steps_per_epoch=steps)
    witness = _Witness(arm)
    model = stirred(run, arm.device)
    _copy_into(arm.raw, model, mesh)
    reference = OneProcess(run, model) if mesh.is_main else None
    for step in range(steps):
        if ways:
            use_exchange(arm.raw, mesh, ways[step % len(ways)])
        batches = list(batches_of(run, step, arm.device))
        shares = [shares_of(step, micro, len(batch), mesh.world) for micro, batch in enumerate(batches)]
        with warnings.catch_warnings():
            # Of DDP, where an axis of size 1 may have any stride.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            arm.train_step([part_of(b, s, mesh.rank) for b, s in zip(batches, shares, strict=True)])
        log, gradients = arm.take_log(), witness.gradients()
        if reference is not None:
            witness.compare(reference.step(step, batches, shares, arm.lr), log, gradients)
        witness.note_shared()
        if on_step is not None:
            on_step(step + 1)
    witness.compare_end(reference)
    name = str(dtype).removeprefix("torch.")
    return witness.proof(
        steps=steps,
        dtype=name,
        tolerance=TOLERANCE[name] if tolerance is None else tolerance,
        spread=describe(run.parallel, moe.num_experts if moe else None, mesh.world),
        set_aside=set_aside,
    )


def describe(parallel: ParallelConfig, num_experts: int | None, world: int) -> str:
    """The mesh in words, e.g. `4 processes: 2 x 2 (data x expert), tokens travel, flat`."""
    replicas = world // parallel.ep_size
    said = f"{world} process{'es' if world > 1 else ''}: {replicas} x {parallel.ep_size} (data x expert parallel)"
    if world > 1:
        said += ", dense parameters cut over all (FSDP2)" * parallel.shard_dense
        said += ", moments dealt out (ZeRO)" * parallel.zero
    if num_experts is not None and parallel.ep_size > num_experts:
        said += f", each of {num_experts} experts in {parallel.ep_size // num_experts} slices"
    if parallel.ep_size == 1:
        return said
    who = "tokens" if parallel.weight_group == 1 else "weights" if parallel.token_group == 1 else "tokens and weights"
    said += f", {who} travel"
    if parallel.token_group > 1:
        said += f", {parallel.exchange}" + (f" in {parallel.chunks} chunks" if parallel.chunks > 1 else "")
    return said


@torch.no_grad()
def _copy_into(model: SwinTransformer, whole: SwinTransformer, mesh: Mesh) -> None:
    for (name, own), (other, full) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert name == other, (name, other)
        local_part(own).copy_(take_local(full, own, mesh))


class _Witness:
    """Looks at an arm after each step, and remembers the largest difference from the reference.

    Figures are rank 0's, which has the reference; sums over ranks carry them, and the ranks' hashes, to all.
    """

    def __init__(self, arm: Arm) -> None:
        self.arm, self.mesh = arm, arm.mesh
        self.trained = {name: p for name, p in arm.raw.named_parameters() if p.requires_grad}
        self.names = list(self.trained)
        averaged = [f"average/{name}" for name in self.names] if arm.average is not None else []
        self.end_names = [*self.names, *averaged]
        self._before_update: Tensors = {}
        self._loss = self._last = self._norm = 0.0
        self._gradients = dict.fromkeys(self.names, 0.0)
        self._parameters = dict.fromkeys(self.end_names, 0.0)
        self._clips: list[float] = []
        self._routed = self._dropped = 0
        self._same_counts = True
        self._dense, self._experts = hashlib.sha256(), hashlib.sha256()
        arm.optimizer.register_step_pre_hook(self._note_gradients)

    def _note_gradients(self, *_: Any) -> None:
        """Just before the optimiser uses them: later they are zeros."""
        for name, parameter in self.trained.items():
            assert parameter.grad is not None, name
            self._before_update[name] = parameter.grad.detach().clone()

    def gradients(self) -> Tensors:
        """The last step's whole gradients, clipped; a collective call."""
        return {name: gather_full(self._before_update[name], p, self.mesh) for name, p in self.trained.items()}

    def compare(self, expected: Step, log: dict[str, Any], gradients: Tensors) -> None:
        """Hold the step just taken against the reference's."""
        limit, norm = self.arm.run.optim.clip_grad_norm, log["grad_norm"]
        factor = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        self._clips.append(factor)
        self._loss = _larger(self._loss, _relative(log["loss"] + log["aux_loss"], expected.loss))
        self._last = expected.loss
        self._norm = _larger(self._norm, _relative(norm, expected.norm))
        largest = max(float(g.abs().max()) for g in expected.gradients.values())
        for name, gradient in expected.gradients.items():
            difference = _distance(gradients[name] / factor, gradient) / largest
            self._gradients[name] = _larger(self._gradients[name], difference)
        for layer, numbers in log["routing"].items():
            routed, kept = expected.routed[layer], expected.kept[layer]
            self._same_counts &= numbers["routed"] == routed and numbers["kept"] == kept
            self._routed += sum(numbers["routed"])
            self._dropped += sum(numbers["routed"]) - sum(numbers["kept"])

    def note_shared(self) -> None:
        """Remember, as hashes, what this rank shares with others: gradients and weights after the step."""
        for name, parameter in self.trained.items():
            if is_cut(parameter):
                continue  # every rank has rows of its own
            kind = self._experts if is_expert_parameter(parameter) else self._dense
            for tensor in (parameter, self._before_update[name]):
                kind.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        for name, buffer in self.arm.raw.named_buffers():
            if name.endswith("expert_bias"):
                self._dense.update(buffer.cpu().numpy().tobytes())

    def _shared_are_equal(self) -> bool:
        """All ranks had the same dense bytes, and replicas the same expert bytes; a collective call."""
        table = torch.zeros(self.mesh.world, 2, dtype=torch.int64, device=self.arm.device)
        for column, kind in enumerate((self._dense, self._experts)):
            table[self.mesh.rank, column] = int.from_bytes(kind.digest()[:7], "little")
        dense, experts = global_sum(table, self.mesh).unbind(1)
        replicas = experts.view(-1, self.mesh.ep_size)
        return bool((dense == dense[0]).all()) and bool((replicas == replicas[0]).all())

    def compare_end(self, reference: OneProcess | None) -> None:
        """Hold parameters, and their average, against the reference's; a collective call."""
        found: Tensors = {}
        for name, parameter in self.trained.items():
            found[name] = gather_full(parameter.detach(), parameter, self.mesh)
        if self.arm.average is not None:
            averaged = dict(self.arm.evaluated().named_parameters())
            for name in self.names:
                own = averaged[name]
                found[f"average/{name}"] = gather_full(own.detach(), own, self.mesh)
        if reference is None:
            return
        expected = {name: p.detach() for name, p in reference.model.named_parameters()}
        expected |= {f"average/{name}": value for name, value in reference.average.items()}
        largest = max(float(p.abs().max()) for p in expected.values())
        for name in self.end_names:
            self._parameters[name] = _distance(found[name], expected[name]) / largest

    def proof(self, **about: Any) -> ParallelProof:
        """Everything seen, equal on all ranks; a collective call."""
        clips = [min(self._clips, default=1.0), max(self._clips, default=1.0)]
        own = [self._last, self._loss, self._norm, *clips, self._routed, self._dropped, self._same_counts]
        own += [*self._gradients.values(), *self._parameters.values()]
        if not self.mesh.is_main:
            own = [0.0] * len(own)
        vector = torch.tensor(own, dtype=torch.float64, device=self.arm.device)
        last, loss, norm, clip, largest_clip, routed, dropped, same, *rest = global_sum(vector, self.mesh).tolist()
        return ParallelProof(
            processes=self.mesh.world,
            loss=last,
            loss_difference=loss,
            norm_difference=norm,
            clip_factor=clip,
            largest_clip_factor=largest_clip,
            routed=int(routed),
            dropped=int(dropped),
            same_counts=bool(same),
            bit_equal=self._shared_are_equal(),
            gradients=dict(zip(self.names, rest, strict=False)),
            parameters=dict(zip(self.end_names, rest[len(self.names) :], strict=True)),
            **about,
        )


def _distance(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite where shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    return float((found - expected).abs().max()) if expected.numel() else 0.0


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-30)


def _larger(a: float, b: float) -> float:
    """max(a, b), NaN counting as infinite."""
    return math.inf if math.isnan(a) or math.isnan(b) else max(a, b)
