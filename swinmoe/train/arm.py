"""One model in training with all that is its own: optimiser, schedule, loss scale, average, counters, randomness.

A run trains one arm; a comparison trains several on the same batches. Accelerate prepares the model only: its shared
gradient scaler, per-call accumulation counter and scheduler stepping are wrong for several models at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from swinmoe.checkpoint import Content, Stack, Stored, Tensors, hold, read_held, share, stacks
from swinmoe.checkpoint.spread import items_of
from swinmoe.comm.failure import naming
from swinmoe.config import RunConfig
from swinmoe.config.io import dump
from swinmoe.config.model import moe_layer_name
from swinmoe.data import Batch
from swinmoe.errors import CheckpointError, ConfigError, NonFiniteLossError
from swinmoe.models import (
    Compiled,
    SwinTransformer,
    build_model,
    compile_blocks,
    leave_native_kernels,
    use_native_kernels,
)
from swinmoe.models.counts import ModelCounts, count
from swinmoe.models.stage import stage_map
from swinmoe.moe import phases, require_slots
from swinmoe.objectives import Classification, StepResult
from swinmoe.parallel import (
    Mesh,
    apply_expert_parallel,
    clip_grad_norm,
    global_min,
    global_sum,
    holders_of,
    is_expert_parameter,
    local_part,
    no_sync,
    saved_on_host,
    shard_dense,
    sync_expert_gradients,
    wrap_data_parallel,
)
from swinmoe.randomness import derive_seed
from swinmoe.runtime import agree
from swinmoe.train.adapt import CapacityFollower
from swinmoe.train.diagnose import first_non_finite, non_finite_parameter
from swinmoe.train.loss_scale import LossScale, make_loss_scale
from swinmoe.train.metrics import IdleExperts, RoutingMeter
from swinmoe.train.optim import make_optimizer, set_rate
from swinmoe.train.schedule import LearningRate, Length, make_learning_rate

Result = TypeVar("Result")


@dataclass
class Arm:
    """A model in training. Build it with `make_arm`."""

    name: str
    run: RunConfig
    mesh: Mesh
    device: torch.device
    raw: SwinTransformer
    model: nn.Module
    """`raw` as Accelerate prepared it (wrapped for data parallelism when there are several processes)."""
    optimizer: Optimizer
    """AdamW, or several that step as one where ranks share the work."""
    objective: Classification
    rate: LearningRate
    length: Length
    scale: LossScale
    counts: ModelCounts
    average: AveragedModel | None
    autocast: Callable[[], Any]
    compiled: Compiled | None = None
    """What `train.compile` did."""
    step: int = 0
    seconds: float = 0.0
    """Step time only: no loading, no evaluation."""
    lr: float = 0.0
    meter: RoutingMeter = field(default_factory=RoutingMeter)
    idle: IdleExperts = field(default_factory=IdleExperts)
    follower: CapacityFollower = field(init=False)
    """Of adaptive capacity."""
    capacity_changes: dict[str, dict[str, float]] = field(default_factory=dict)
    """What it decided after the last step."""
    history: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean training loss since the line before) of every log line."""
    scored: tuple[int, float] | None = None
    """Step and accuracy of the last evaluation."""
    _loss: Tensor | None = None
    _aux: Tensor | None = None
    _correct: Tensor | None = None
    _norm: Tensor | None = None
    _logged_steps: int = 0
    _logged_at: float = 0.0

    def __post_init__(self) -> None:
        self.follower = CapacityFollower(self.raw)

    @property
    def done(self) -> bool:
        """True once the arm has trained for its whole length."""
        return self.length.done(self.step, self.seconds)

    @property
    def unlogged_steps(self) -> int:
        """Steps since `take_log`."""
        return self._logged_steps

    @property
    def images(self) -> int:
        """Images trained on so far, over all ranks."""
        return self.step * self.run.train.batch_size

    @property
    def flops(self) -> float:
        """Training FLOPs spent so far, over all ranks (closed form: see `models.counts`)."""
        train = self.run.train
        return float(self.step * self.counts.step_flops(train.batch_size, train.accumulation))

    def train_step(self, batches: Sequence[Batch]) -> None:
        """One optimiser step over this rank's micro-batches.

        Each rank's loss is its local sum over the global image count; gradients are then summed over ranks, so the
        result does not depend on how many processes share the batch.

        Raises:
            NonFiniteLossError: on all ranks alike; the parameters are left as they were before this step.
        """
        began = self._clock()
        self.model.train()
        self.lr = self.rate.at(self.step, self.seconds)
        set_rate(self.optimizer, self.lr)
        counted: list[StepResult] = []
        for micro, batch in enumerate(batches):
            with no_sync(self.model) if micro + 1 < len(batches) else nullcontext():
                self.seed_draws(micro)
                counted.append(self._backward(batch, len(batches)))
        sync_expert_gradients(self.raw, self.mesh)
        phases.turn(phases.UPDATE)
        phases.enter(phases.OPTIMIZER)
        limit = self.run.optim.clip_grad_norm
        norm = (
            clip_grad_norm(self.raw, None if limit is None else limit * self.scale.value, self.mesh) / self.scale.value
        )
        finite = bool(torch.isfinite(norm))  # the norm is global: every rank takes the same branch
        if not finite and (not self.scale.dynamic or self.scale.value <= 1):
            self.optimizer.zero_grad()
            raise NonFiniteLossError(self._explain_non_finite(batches))
        if finite:
            if self.scale.value != 1.0:
                gradients = [local_part(p.grad) for p in self.raw.parameters() if p.grad is not None]
                torch._foreach_div_(gradients, self.scale.value)
            self.optimizer.step()
            self._after_update(counted)
        self.scale.update(overflowed=not finite)
        self.optimizer.zero_grad()
        self._note(counted, norm)
        self.step += 1
        self.capacity_changes = self.follower.decide(self.step, self._maximum)
        spent = self._clock() - began
        if self.length.seconds is not None and self.mesh.world > 1:  # ranks must stop at the same step
            spent = float(self.reduce(torch.tensor([spent], dtype=torch.float64, device=self.device))) / self.mesh.world
        self.seconds += spent

    def seed_draws(self, micro: int) -> None:
        """Key every random draw of the coming forward pass by (seed, step, micro-batch, rank): resuming needs no state,
        and twins draw the same drop paths."""
        key = (self.run.seed, "step", self.step, micro, self.mesh.rank)
        torch.manual_seed(derive_seed(*key))
        for name, layer in self.raw.moe_layers().items():
            layer.seed_noise(derive_seed(*key, name))

    def take_log(self) -> dict[str, Any]:
        """Numbers of a `step` record since the last call, reduced over all ranks (all ranks must call it)."""
        steps = max(1, self._logged_steps)
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        values = torch.stack([zero if v is None else v for v in (self._loss, self._correct, self._aux)])
        loss, correct, aux = self.reduce(values).tolist()
        routing = self.meter.take(self.reduce)
        dead = self.idle.dead(self.run.train.dead_expert_window, self.reduce)
        for layer, numbers in routing.items():
            numbers["dead_experts"] = dead.get(layer, 0)
        for layer, numbers in self.follower.take_log(self._maximum, self.reduce).items():
            routing[layer] |= numbers
        images = steps * self.run.train.batch_size
        self.history.append((self.step, loss / images))
        spent = self.seconds - self._logged_at
        self._loss = self._correct = self._aux = None
        self._logged_steps, self._logged_at = 0, self.seconds
        return {
            "loss": loss / images,
            "accuracy": correct / images,
            "aux_loss": aux / self.mesh.world / steps,
            "grad_norm": float(self._norm) if self._norm is not None else None,
            "lr": self.lr,
            "images": self.images,
            "flops": self.flops,
            "seconds": self.seconds,
            "images_per_second": images / spent if spent > 0 else None,
            "routing": routing,
        }

    def reduce(self, vector: Tensor) -> Tensor:
        """Sum over all ranks, without gradient."""
        return global_sum(vector, self.mesh)

    def _maximum(self, vector: Tensor) -> Tensor:
        """The largest of each element over all ranks."""
        return -global_min(-vector, self.mesh)

    def evaluated(self) -> SwinTransformer:
        """The model that evaluation judges: the moving average if there is one."""
        if self.average is None:
            return self.raw
        averaged = self.average.module
        assert isinstance(averaged, SwinTransformer)  # AveragedModel types it as any module
        return averaged

    def content(self) -> Content:
        """What a checkpoint holds of this arm, apart from `values`: views of its tensors, as this rank has them."""
        model = hold(self.raw.state_dict(), self.stacks)
        groups = {"model": model, "optimizer": hold(self._moments(), self.stacks, self._holders())}
        if self.average is not None:
            groups["average"] = hold(self.average.module.state_dict(), self.stacks)
        return Content(groups, dump(self.run))

    def values(self) -> dict[str, Any]:
        """The rest to go on from, for JSON. All ranks must call it."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "loss_scale": [self.scale.value, self.scale.good_steps],
            "idle": self.idle.state(partial(global_min, mesh=self.mesh)),
            "capacity": self.follower.state(self._maximum),
            "history": self.history,
            "length": [self.length.steps, self.length.seconds],
            "lr": self.lr,
            "averaged": None if self.average is None else int(self.average.n_averaged),
        }

    def load(self, stored: Stored, prefix: str, values: Mapping[str, Any]) -> None:
        """Back to what was saved, by any number of processes; this rank reads what it holds.

        Args:
            stored: the checkpoint.
            prefix: of this arm's files in it, "" or `NAME/`.
            values: as `values()` gave them.

        Raises:
            CheckpointError: something is missing, does not fit, or the arm was to train for another length.
            DamagedError: a file is not what was written. The arm is part old, part new then: load another checkpoint.
        """
        if values["length"] != [self.length.steps, self.length.seconds]:
            raise CheckpointError(
                f"arm {self.name!r} was to train for [steps, seconds] = {values['length']} and now for "
                f"{[self.length.steps, self.length.seconds]}: its schedule would break; start "
                "a new run under another name"
            )
        self._read(self._open(stored, f"{prefix}model"), self.raw.state_dict())
        self.optimizer.state.clear()
        if f"{prefix}optimizer" in stored.groups:  # else no step has been taken yet, or all of them overflowed
            moments = self._open(stored, f"{prefix}optimizer")
            self._make_moments(moments)
            self._read(moments, self._moments(), self._holders())
        if self.average is not None:
            if f"{prefix}average" not in stored.groups:
                raise CheckpointError("train.ema_decay is set but the checkpoint holds no moving average")
            self._read(self._open(stored, f"{prefix}average"), self.average.module.state_dict())
            self.average.n_averaged.fill_(values["averaged"])
        self.step, self.seconds = values["step"], values["seconds"]
        self._logged_at = self.seconds
        self.scale.value, self.scale.good_steps = values["loss_scale"]
        self.idle.load(values["idle"])
        self.follower.load(values["capacity"])
        self.history = [(int(step), float(loss)) for step, loss in values["history"]]

    def begin_with_moments(self, saved: Tensors) -> set[str]:
        """Let the optimiser of a fresh arm begin with `saved`, named as in checkpoints. Returns the trained parameters
        that find none of their shape there, and begin as always. All ranks call it.

        Raises:
            CheckpointError: see `load`.
        """
        keys = sorted({name.rpartition("#")[2] for name in saved})
        fitting: set[str] = set()
        names: set[str] = set()
        for name, parameter in self.raw.named_parameters():
            if not parameter.requires_grad:
                continue
            scalars = {
                f"{name}#{key}" for key in keys if f"{name}#{key}" in saved and not saved.entry(f"{name}#{key}").shape
            }
            shaped = {f"{name}#{key}": parameter for key in keys if f"{name}#{key}" not in scalars}
            items = list(items_of(hold(shaped, self.stacks), self.mesh))
            if all(item.name in saved and saved.entry(item.name).shape == item.shape.size for item in items):
                fitting.add(name)
                names |= {*scalars, *(item.name for item in items)}
        part = Tensors(saved.label, saved.files, names)
        self._make_moments(part, fitting)
        self._read(part, self._moments(), self._holders())
        return {name for name, parameter in self.raw.named_parameters() if parameter.requires_grad} - fitting

    @cached_property
    def stacks(self) -> dict[str, Stack]:
        """How the experts of each parameter lie over the ranks."""
        return stacks(self.raw)

    def _moments(self) -> dict[str, Tensor]:
        """The optimiser's tensors, as `PARAMETER#KEY`."""
        states = ((name, self.optimizer.state.get(parameter, {})) for name, parameter in self.raw.named_parameters())
        return {f"{name}#{key}": value for name, state in states for key, value in state.items()}

    def _holders(self) -> dict[str, frozenset[int]]:
        """Ranks that hold a parameter's moments, by its name, where not all do that hold the parameter."""
        found = ((name, holders_of(self.optimizer, parameter)) for name, parameter in self.raw.named_parameters())
        return {name: ranks for name, ranks in found if ranks is not None}

    def _make_moments(self, saved: Tensors, names: Collection[str] | None = None) -> None:
        """Room for the optimiser's tensors, as `saved` has them: of the parameter's shape, or scalars. What another
        rank holds is named, without room. `names`: of the parameters, where not all have any."""
        keys = sorted({name.rpartition("#")[2] for name in saved})
        for name, parameter in self.raw.named_parameters():
            if parameter.requires_grad and (names is None or name in names):
                whole = {key: saved.entry(f"{name}#{key}") for key in keys if f"{name}#{key}" in saved}
                holders = holders_of(self.optimizer, parameter)
                device = self.device if holders is None or self.mesh.rank in holders else torch.device("meta")
                self.optimizer.state[parameter] = {
                    key: torch.empty((), dtype=whole[key].dtype, device=device)
                    if key in whole and whole[key].shape == ()
                    else torch.empty_like(parameter.detach(), device=device)
                    for key in keys
                }

    def _read(
        self, saved: Tensors, own: Mapping[str, Tensor], holders: Mapping[str, frozenset[int]] | None = None
    ) -> None:
        def read() -> None:
            read_held(hold(own, self.stacks, holders), saved, self.mesh)
            saved.settle()

        self._together(read)

    def _open(self, stored: Stored, group: str) -> Tensors:
        return self._together(lambda: stored.tensors(group))

    def _together(self, work: Callable[[], Result]) -> Result:
        """What `work` returns; if it fails on one rank, its error on all: what follows is a collective call."""
        result, problem = None, None
        try:
            result = work()
        except CheckpointError as error:
            problem = error
        share(self.mesh, problem, None)
        return cast(Result, result)

    def _backward(self, batch: Batch, micro_batches: int) -> StepResult:
        phases.turn(phases.FORWARD)
        # DDP compares its buckets in the second step's forward pass, and sums them while the backward pass computes.
        saved = saved_on_host(self.device) if self.run.train.offload_activations else nullcontext()
        with saved, self.autocast(), naming("the forward pass", amid_other_work=True):
            result = self.objective(self.model, batch)
        moe = self.run.model.moe
        # A global balance loss is the same on every rank and its gradient is summed: it counts once. A local one is
        # each rank's own: the mean over ranks counts.
        shares = self.mesh.world if moe is not None and moe.losses.batch == "local" else 1
        loss = result.loss_sum / self.run.train.batch_size + result.aux_loss / (micro_batches * shares)
        with naming("summing gradients over all ranks, in the backward pass,", amid_other_work=True):
            phases.turn(phases.BACKWARD)
            (loss * self.scale.value).backward()
            phases.enter(phases.OTHER)
        return result

    def _after_update(self, counted: Sequence[StepResult]) -> None:
        for name, layer in self.raw.moe_layers().items():
            if layer.cfg.router.bias_update_rate > 0 and any(p.requires_grad for p in layer.router.parameters()):
                layer.update_bias(self.reduce(torch.stack([r.routing[name].routed for r in counted]).sum(0)))
        if self.average is not None:
            self.average.update_parameters(self.raw)

    def _note(self, counted: Sequence[StepResult], norm: Tensor) -> None:
        for result in counted:
            self.meter.add(result.routing)
            self.idle.add(result.routing)
            self.follower.note(result.routing)
        self.idle.step()
        loss = torch.stack([r.loss_sum.detach().double() for r in counted]).sum()
        aux = torch.stack([r.aux_loss.detach().double() for r in counted]).mean()
        correct = torch.stack([r.correct.double() for r in counted]).sum()
        self._loss = loss if self._loss is None else self._loss + loss
        self._aux = aux if self._aux is None else self._aux + aux
        self._correct = correct if self._correct is None else self._correct + correct
        self._norm = norm
        self._logged_steps += 1

    def _explain_non_finite(self, batches: Sequence[Batch]) -> str:
        """Where the first non-finite value is. All ranks ask alike and look at the same things in the same order: a
        forward pass exchanges tokens, and a rank that stopped early would leave its peers waiting."""
        where = non_finite_parameter(self.raw)
        if not self._anywhere(where):
            for micro, batch in enumerate(batches):
                self.seed_draws(micro)
                found = first_non_finite(self.raw, partial(self.objective, self.raw, batch), self.autocast)
                where = where or found
            if not self._anywhere(where):
                where = "the backward pass (every forward value is finite)"
        return (
            f"arm {self.name!r}: the loss or its gradient is not finite at step {self.step + 1}, first in "
            f"{where or 'a layer on another rank'}; the update was not applied and the last checkpoint is kept. Lower "
            "optim.base_lr, lengthen the warm-up, or use train.precision: fp32"
        )

    def _anywhere(self, found: str | None) -> bool:
        """True on all ranks if any of them found something."""
        flag = torch.tensor([float(found is not None)], dtype=torch.float64, device=self.device)
        return bool(self.reduce(flag) > 0)

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def make_arm(
    name: str,
    run: RunConfig,
    mesh: Mesh,
    accelerator: Any,
    length: Length,
    steps_per_epoch: int,
    prepare: Callable[[SwinTransformer], None] | None = None,
) -> Arm:
    """Build, spread and wrap the model of `run`, with its optimiser and schedule.

    `accelerator` is `runtime.make_accelerator(...)`'s; initial weights depend on `run.seed` and parameter names only.
    `prepare` is handed the whole model before it is spread: to load weights, to freeze parameters.
    """
    check_capacity(run, mesh.world)
    if run.finetune is not None and prepare is None:
        raise ConfigError(
            "the config has a finetune section, which only swinmoe finetune obeys; use it, or remove that"
        )
    device = accelerator.device
    dtype = torch.float64 if run.train.precision == "fp64" else torch.float32
    raw = build_model(run.model, seed=run.seed, device=device, dtype=dtype)
    if prepare is not None:
        prepare(raw)
    apply_expert_parallel(raw, mesh)
    agree({f"the expert placement of {name!r}": _placement(raw, mesh)})
    if run.train.native_kernels == "all":
        use_native_kernels(raw)
    elif run.train.native_kernels == "none":
        leave_native_kernels(raw)
    decay = run.train.ema_decay
    average = AveragedModel(raw, multi_avg_fn=_averaging(decay)) if decay is not None else None
    if average is not None:
        average.requires_grad_(False)
        if mesh.config.shard_dense and mesh.world > 1:
            shard_dense(average.module, mesh)
    compiled = compile_blocks(raw) if run.train.compile else None
    model = wrap_data_parallel(raw, mesh, accelerator)
    return Arm(
        name=name,
        run=run,
        mesh=mesh,
        device=device,
        raw=raw,
        model=model,
        optimizer=make_optimizer(raw, run.optim, mesh),
        objective=Classification(label_smoothing=run.train.label_smoothing),
        rate=make_learning_rate(run.optim, run.schedule, run.train, length, steps_per_epoch),
        length=length,
        scale=make_loss_scale(run.train.precision),
        counts=count(run.model),
        average=average,
        autocast=accelerator.autocast,
        compiled=compiled,
    )


def _averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    """The moving average's update, on what this rank has of each tensor."""
    update = get_ema_multi_avg_fn(decay)

    def follow(averages: Sequence[Tensor], values: Sequence[Tensor], count: Any) -> None:
        update([local_part(a) for a in averages], [local_part(v) for v in values], count)

    return follow


def _placement(model: SwinTransformer, mesh: Mesh) -> str:
    """How the experts are spread, in words that are equal on all ranks if they see it alike."""
    held = [p.numel() for p in model.parameters() if is_expert_parameter(p)]
    return (
        f"{mesh.replicas} set(s) of experts over {mesh.ep_size} rank(s) each, {mesh.config}, "
        f"{sum(held)} numbers in {len(held)} expert parameters here"
    )


def check_capacity(run: RunConfig, world: int) -> None:
    """Refuse a run whose own training batch would leave experts without a slot (`ConfigError`)."""
    moe = run.model.moe
    if moe is None:
        return
    images = run.train.batch_size // (run.train.accumulation * world)
    for stage, blocks in enumerate(run.model.moe_blocks):
        for block in blocks:
            height, width = stage_map(run.model, stage)
            policy = moe.capacity.of(moe_layer_name(stage, block)).train
            require_slots(policy, images * height * width, moe.num_experts, moe.top_k)
