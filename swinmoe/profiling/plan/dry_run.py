"""One training step on a group of any size that is not there, by a model without storage: does the plan hold?

The code that runs is the one that trains: mesh, spreading, exchange, sums of gradients, clipping. On the meta device
nothing is stored and nothing is computed, and in a pretended group nothing travels; what is left is what is asked for:
who holds what, and who would send how much. Sizes must not depend on values there, so expert layers run padded; where
the config lays rows out without padding, slots are those of balanced routing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import isclose
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from swinmoe.comm import listen
from swinmoe.config import RunConfig
from swinmoe.config.io import with_overrides
from swinmoe.errors import ConfigError
from swinmoe.models import SwinTransformer, build_model
from swinmoe.parallel import (
    Mesh,
    apply_expert_parallel,
    clip_grad_norm,
    holders_of,
    local_part,
    make_mesh,
    no_sync,
    sync_expert_gradients,
    wrap_data_parallel,
)
from swinmoe.profiling.plan.hardware import Hardware
from swinmoe.profiling.plan.memory import kept_for_backward, plan_memory
from swinmoe.profiling.plan.predict import Scene, images_per_micro_batch, setting, spreads_of
from swinmoe.profiling.plan.traffic import plan_traffic
from swinmoe.profiling.plan.work import expert_layers
from swinmoe.runtime.pretend import pretended_processes, shards_without_storage
from swinmoe.train import make_optimizer

EXACT = 1e-9
ACTIVATIONS = 0.15
"""Relative error that the closed form of activations may have: small tensors are left out of it."""


@dataclass(frozen=True)
class Check:
    """One figure, planned and found."""

    what: str
    planned: float
    found: float
    tolerance: float = EXACT

    @property
    def holds(self) -> bool:
        """True if they agree."""
        return isclose(self.planned, self.found, rel_tol=self.tolerance, abs_tol=1e-6)


@dataclass(frozen=True)
class Look:
    """What one rank of the pretended job is and does."""

    rank: int
    experts: str
    """Which experts it holds, in words."""
    neighbours: tuple[int, ...]
    """Ranks that share its set of experts."""
    replicas: tuple[int, ...]
    """Ranks that hold the same experts."""
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class DryRun:
    """The whole of it."""

    world: int
    looks: tuple[Look, ...]
    set_aside: tuple[str, ...]
    """What differs from the config, in words."""

    @property
    def holds(self) -> bool:
        """True if every figure agrees on every rank looked at."""
        return all(check.holds for look in self.looks for check in look.checks)


def dry_run(run: RunConfig, hardware: Hardware, world: int) -> DryRun:
    """Step the first and the last rank of `world`, and hold what they have and send against the closed forms.

    Args:
        run: the config; its batch is that of all ranks.
        hardware: says how many ranks share a node.
        world: ranks.

    Raises:
        ConfigError: batch or experts cannot be spread over so many ranks.
        DistributedError: this process was started by a launcher.
    """
    if world < 1:
        raise ConfigError(f"--dry-run {world}: give a number of ranks from 1 up")
    tame, changes = _without_values(run, hardware, world)
    looks = tuple(_look(tame, hardware, world, rank) for rank in sorted({0, world - 1}))
    return DryRun(world, looks, tuple(changes))


def _without_values(run: RunConfig, hardware: Hardware, world: int) -> tuple[RunConfig, list[str]]:
    """The config with everything that depends on values put aside, and what that is."""
    plain: dict[str, Any] = {
        "precision": "fp32",
        "ema_decay": None,
        "offload_activations": False,
        "native_kernels": "none",
    }
    over: dict[str, Any] = {"train": plain, "parallel": {}}
    if hardware.device != "cpu":  # nor would it have kernels of ours
        plain["native_kernels"] = run.train.native_kernels
    changes = [f"train.{key}={getattr(run.train, key)}" for key in plain if getattr(run.train, key) != plain[key]]
    moe = run.model.moe
    if moe is not None:
        policy = moe.capacity.train
        kinds = sorted({moe.capacity.of(layer.name).train.kind for layer in expert_layers(run.model)})
        if moe.dispatcher != "padded" or kinds != ["fixed"]:
            fixed = {"kind": "fixed", "factor": 1.0, "min_slots": policy.min_slots}
            over["model"] = {"moe": {"dispatcher": "padded", "capacity": {"train": fixed, "layers": None}}}
            said = " and ".join(kinds)
            changes.append(f"dispatcher {moe.dispatcher}, capacity {said} (padded, slots of balanced routing)")
    if run.parallel.exchange == "2dh" and run.parallel.local_size is None:
        # of the node that is planned for, not of the machine that this runs on
        over["parallel"]["local_size"] = min(hardware.processes_per_node, run.parallel.ep_size)
    return with_overrides(run, over), changes


def _look(run: RunConfig, hardware: Hardware, world: int, rank: int) -> Look:
    images = images_per_micro_batch(run, world)
    scene = Scene(replace(hardware, fused_attention=False), world)
    spreads = spreads_of(run, scene, images)
    sharded = shards_without_storage() if run.parallel.shard_dense and world > 1 else nullcontext()
    with pretended_processes(world, rank), sharded:
        mesh = make_mesh(run.parallel, run.model.moe.num_experts if run.model.moe else None)
        raw = build_model(run.model, device="meta")
        apply_expert_parallel(raw, mesh)
        model = wrap_data_parallel(raw, mesh, _unsynchronised)
        model.train()
        pictures = torch.empty(images, run.model.in_chans, *run.model.img_size, device="meta")
        with listen() as sent:
            kept, optimizer = _step(raw, model, mesh, pictures, run)
        heard: defaultdict[tuple[str, str], float] = defaultdict(float)
        for message in sent:
            heard[message.operation, message.what.split(": ")[-1]] += message.bytes
        held = _held(raw, optimizer, rank)
        look = Look(
            rank=rank,
            experts=_experts_of(mesh, run),
            neighbours=tuple(range(mesh.replica * mesh.ep_size, (mesh.replica + 1) * mesh.ep_size)),
            replicas=tuple(range(mesh.ep_rank, world, mesh.ep_size)),
            checks=(),
        )
    at = setting(run, scene.hardware, images)
    memory = plan_memory(run, spreads, at, world, rank)
    planned_kept = sum(kept_for_backward(run.model, spreads, at))
    planned = plan_traffic(run, spreads, world, rank)
    checks = [
        Check("dense parameters, bytes", memory.dense, held["dense"]),
        Check("expert parameters, bytes", memory.experts, held["experts"]),
        Check("gradients, bytes", memory.gradients, held["gradients"]),
        Check("moments, bytes", memory.moments, held["moments"]),
        Check("kept for the backward pass, bytes", planned_kept, kept, ACTIVATIONS),
        *_messages(planned, heard),
    ]
    return replace(look, checks=tuple(checks))


def _messages(planned: Mapping[tuple[str, str], float], heard: Mapping[tuple[str, str], float]) -> Iterator[Check]:
    for key in sorted({*planned, *(key for key, value in heard.items() if value)}):
        yield Check(f"{key[0]}: {key[1]}, bytes", planned.get(key, 0.0), heard.get(key, 0.0))


def _unsynchronised(model: nn.Module) -> nn.Module:
    """DDP that does not look at values, of which there are none."""
    return DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False)


def _step(
    raw: SwinTransformer, model: nn.Module, mesh: Mesh, pictures: Tensor, run: RunConfig
) -> tuple[float, Optimizer]:
    """One optimiser step; bytes kept for the backward pass of one micro-batch, and the optimiser."""
    optimizer = make_optimizer(raw, run.optim, mesh)
    kept = 0.0
    for micro in range(run.train.accumulation):
        last = micro + 1 == run.train.accumulation
        with _summing(model, last), _counted(raw) as storages:
            output = model(pictures)
            loss = output.logits.sum() + output.aux_loss
            # now, not as they were met: FSDP2 has emptied those of weights that it gathers again
            kept = float(sum(storage.nbytes() for storage in storages.values()))
            loss.backward()
    sync_expert_gradients(raw, mesh)
    clip_grad_norm(raw, run.optim.clip_grad_norm, mesh)
    optimizer.step()
    return kept, optimizer


@contextmanager
def _summing(model: nn.Module, last: bool) -> Iterator[None]:
    if last:
        yield
    else:
        with no_sync(model):
            yield


@contextmanager
def _counted(model: nn.Module) -> Iterator[dict[int, UntypedStorage]]:
    """Every storage saved for the backward pass, by identity; parameters and buffers apart."""
    own = {local_part(t).untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, UntypedStorage] = {}  # kept alive, so that no identity is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield seen


def _held(model: SwinTransformer, optimizer: Optimizer, rank: int) -> dict[str, float]:
    """Bytes of parameters, gradients and moments that are here."""
    found: Counter[str] = Counter()
    experts = {p for layer in model.moe_layers().values() for p in layer.experts.parameters()}
    for parameter in model.parameters():
        found["experts" if parameter in experts else "dense"] += local_part(parameter).nbytes
        if parameter.grad is not None:
            found["gradients"] += local_part(parameter.grad).nbytes
        holders = holders_of(optimizer, parameter)
        if holders is None or rank in holders:  # else its state has names and shapes alone
            state = optimizer.state.get(parameter, {})
            found["moments"] += sum(local_part(t).nbytes for t in state.values() if t.dim())
    return {key: float(found[key]) for key in ("dense", "experts", "gradients", "moments")}


def _experts_of(mesh: Mesh, run: RunConfig) -> str:
    moe = run.model.moe
    if moe is None:
        return "none"
    slices = mesh.slices(moe.num_experts)
    if slices > 1:
        return f"slice {mesh.ep_rank % slices} of {slices} of expert {mesh.ep_rank // slices}"
    here = moe.num_experts // mesh.ep_size
    first = mesh.ep_rank * here
    return f"expert {first}" if here == 1 else f"experts {first} to {first + here - 1}"
