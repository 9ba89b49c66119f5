"""One run on so many ranks of a machine: step time, images per second, memory and traffic.

    step = A·(blocks + expert layers, forward and backward) + exposed sums of gradients + the optimiser

for A micro-batches; a step lasts as long as on the busiest rank. Sums of gradients hide behind the backward pass as far
as the machine lets them; what is left waits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from swinmoe.config import RunConfig
from swinmoe.errors import ConfigError
from swinmoe.models.counts import count
from swinmoe.profiling.plan.cost import Cost
from swinmoe.profiling.plan.exchange import Layout, all_gather, all_reduce, layout, sum_few
from swinmoe.profiling.plan.hardware import Hardware
from swinmoe.profiling.plan.memory import Memory, kept_for_backward, plan_memory
from swinmoe.profiling.plan.spread import Spread, needs_padding
from swinmoe.profiling.plan.tensors import shares_of, units_of
from swinmoe.profiling.plan.traffic import plan_traffic
from swinmoe.profiling.plan.work import Setting, expert_layers, parts

BUCKET_BYTES = 25 * 2**20
"""DDP's: what it sums at a time, and so what is left to sum when the backward pass is over."""


@dataclass(frozen=True)
class Scene:
    """Where a run is planned for."""

    hardware: Hardware
    world: int
    imbalance: float | None = None
    """Rows of the busiest rank over the mean; None = what random choices give."""


@dataclass(frozen=True)
class Prediction:
    """Of one optimiser step, on the busiest rank; seconds and bytes."""

    world: int
    images: int
    """Over all ranks."""
    micro_batches: int
    seconds: float
    dense: float
    """Everything but expert layers, forward and backward."""
    experts: float
    """Products and activations of experts."""
    moe_other: float
    """Routing, rows scattered and gathered."""
    exchange: float
    """Waiting for tokens, weights and counts of expert layers."""
    sync: float
    """Waiting for sums of gradients."""
    update: float
    """Clipping and optimiser."""
    memory: Memory
    bytes_sent: float
    fits: bool
    imbalance: float
    """λ of the first expert layer."""

    @property
    def images_per_second(self) -> float:
        """Over all ranks."""
        return self.images / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        tree = asdict(self)
        tree["memory"]["total"] = self.memory.total
        return {**tree, "images_per_second": self.images_per_second}


def images_per_micro_batch(run: RunConfig, world: int) -> int:
    """Images of one rank's micro-batch.

    Raises:
        ConfigError: the ranks' shares are not equal, or empty.
    """
    pieces = run.train.accumulation * world
    images, left = divmod(run.train.batch_size, pieces)
    if left or not images:
        raise ConfigError(
            f"train.batch_size={run.train.batch_size} cannot be split evenly over {world} ranks and "
            f"train.accumulation={run.train.accumulation}; give --batch, images of each rank, or a multiple of {pieces}"
        )
    return images


def spreads_of(run: RunConfig, scene: Scene, images: int) -> list[Spread]:
    """How every expert layer of `run` lies over the ranks.

    Raises:
        ConfigError: ep_size does not divide the ranks, or does not fit the experts.
    """
    moe = run.model.moe
    if moe is None:
        return []
    ep = run.parallel.ep_size
    if scene.world % ep:
        raise ConfigError(f"parallel.ep_size={ep} does not divide {scene.world} ranks; use a divisor of {scene.world}")
    run.parallel.check_experts(moe.num_experts)
    at = setting(run, scene.hardware, images)
    spreads = []
    for layer in expert_layers(run.model):
        own = replace(moe, capacity=moe.capacity.of(layer.name))
        padded = needs_padding(moe.dispatcher, scene.hardware.device, own.capacity.train.kind)
        spreads.append(
            Spread(
                layer,
                own,
                run.parallel,
                at,
                padded,
                scene.world,
                scene.hardware.processes_per_node,
                imbalance=scene.imbalance,
                recomputed=run.model.recomputes(layer.stage),
            )
        )
    return spreads


def setting(run: RunConfig, hardware: Hardware, images: int) -> Setting:
    """Micro-batch, precision, and what stays in the cache. A CPU is taken to have a compiler for our kernels."""
    on_cpu, train, moe = hardware.device == "cpu", run.train, run.model.moe
    kernel = on_cpu and train.precision == "fp32" and train.native_kernels != "none"
    if moe is not None:
        kernel = kernel and moe.experts.type in ("gelu", "relu")
    return Setting(images, train.precision, hardware.fused_attention, on_cpu, kernel)


def predict(run: RunConfig, scene: Scene) -> Prediction:
    """What a step of `run` takes on the ranks of `scene`.

    Raises:
        ConfigError: batch or experts cannot be spread over so many ranks, or nobody measured how they send.
    """
    world, precision = scene.world, run.train.precision
    scene.hardware.check_links(world)
    here = min(world, scene.hardware.processes_per_node)
    hardware = scene.hardware.among(here)
    scene = replace(scene, hardware=hardware)
    images = images_per_micro_batch(run, world)
    spreads = spreads_of(run, scene, images)
    forward, backward = dense_work(run, hardware, images)
    ahead, back = (hardware.seconds(cost, precision, here) for cost in (forward, backward))
    dense = ahead + back
    layers = [spread.seconds(hardware, here) for spread in spreads]
    working = [sum(layer.forward for layer in layers), sum(layer.backward for layer in layers)]
    waiting, computing = sum(layer.waiting for layer in layers), sum(layer.experts for layer in layers)
    # Who waits for the slowest in one layer has begun the next late, and all that lies between them too.
    meets = [any(spread.meets[way] for spread in spreads) for way in (0, 1)]
    lag = hardware.lockstep(here) - 1
    waiting += lag * sum(x * (a + b) for x, a, b in zip(meets, (ahead, back), working, strict=True))
    A = run.train.accumulation
    sync = exposed_sync(run, scene, spreads, ahead + computing / 2, back + computing / 2)
    update = hardware.seconds(update_work(run, spreads, scene), precision, here)
    memory = plan_memory(run, spreads, setting(run, hardware, images), world)
    sent = plan_traffic(run, spreads, world)
    return Prediction(
        world=world,
        images=run.train.batch_size,
        micro_batches=A,
        seconds=A * (dense + sum(working) + waiting) + sync + update,
        dense=A * dense,
        experts=A * computing,
        moe_other=A * (sum(working) - computing),
        exchange=A * waiting,
        sync=sync,
        update=update,
        memory=memory,
        bytes_sent=sum(sent.values()),
        fits=memory.total <= hardware.memory.value - hardware.reserved.value,
        imbalance=spreads[0].busiest if spreads else 1.0,
    )


def dense_work(run: RunConfig, hardware: Hardware, images: int) -> tuple[Cost, Cost]:
    """Of a micro-batch, everything but experts and what carries rows; forward, and backward with all that is computed
    again."""
    at = setting(run, hardware, images)
    forward, backward = Cost(), Cost()
    for part in parts(run.model, at):
        forward, backward = forward + part.forward, backward + part.backward
        in_block = part.name in ("attention", "mlp", "shared")
        chunked = part.name == "attention" and run.model.chunks_of(part.stage) > 1
        if in_block and (run.model.recomputes(part.stage) or chunked):
            backward += part.forward
    if run.train.offload_activations:
        kept, _ = kept_for_backward(run.model, [], at)
        forward, backward = forward + Cost(copy=kept), backward + Cost(copy=kept)
    return forward, backward


def update_work(run: RunConfig, spreads: list[Spread], scene: Scene) -> Cost:
    """Norm and clipping of gradients, AdamW; a moving average where there is one.

    AdamW reads parameter, gradient and both moments and writes all but the gradient: 7 passes over what this rank
    steps; over what it keeps, the norm 1, clipping 2, the average 3.
    """
    shares = shares_of(run, spreads, scene.world)
    wide = 8 if run.train.precision == "fp64" else 4
    passes = 3 + (3 if run.train.ema_decay is not None else 0)
    return Cost(update=wide * (7 * shares.moments + passes * shares.gradients), calls=40)


def exposed_sync(run: RunConfig, scene: Scene, spreads: list[Spread], forward: float, backward: float) -> float:
    """Seconds of gradient sums that nothing hides, and of the collectives that shards of parameters need.

    Args:
        forward: seconds of computing in a micro-batch's forward pass.
        backward: and in its backward pass.
    """
    hardware, world, parallel = scene.hardware, scene.world, run.parallel
    if world == 1:
        return 0.0
    wide, node = (8 if run.train.precision == "fp64" else 4), hardware.processes_per_node
    ep = parallel.ep_size if spreads else 1
    everyone = layout(world, 1, node)
    after = 0.0
    if parallel.shard_dense:
        times, last = _units(run, spreads, everyone, hardware, wide)
        behind = run.train.accumulation * (forward + backward)
        after += sum_few(everyone, wide, hardware)  # the norm, of which every rank has some rows' share
    else:
        routed = sum(s.layer.num_experts * s.layer.expert_params for s in spreads)
        dense = wide * (count(run.model).trainable - (routed if ep > 1 else 0))
        times, last = (bucketed(size, everyone, hardware) for size in (dense, min(dense, BUCKET_BYTES)))
        behind = backward
        if ep > 1:
            after += sum_few(everyone, wide, hardware)
    if ep > 1 and world > ep:
        replicas = layout(world // ep, ep, node)
        # the ranks of a node share its adapters: their groups of replicas sum at the same time
        times += sum(all_reduce(replicas, wide * s.params_here, hardware) for s in spreads)
    if parallel.zero:
        # Parameters travel from who stepped them when all else is done, like a gather of shares
        for size, at in zip(
            shares_of(run, spreads, world).updated, (everyone, layout(world // ep, ep, node)), strict=True
        ):
            after += all_gather(at, wide * size / at.ranks, hardware) if size else 0.0
    hidden = min(max(0.0, times - last), hardware.overlap.value * behind)
    return times - hidden + after


def _units(
    run: RunConfig, spreads: list[Spread], everyone: Layout, hardware: Hardware, wide: int
) -> tuple[float, float]:
    """Seconds of FSDP2's messages: each unit gathered forward and backward of every micro-batch, its gradients summed
    once; and of those that have nothing to hide behind, the first gather and the last sum."""
    whole = longest = 0.0
    for unit in units_of(run, spreads):
        gather = all_gather(everyone, wide * sum(t.rows(everyone.ranks) for t in unit), hardware)
        trained = sum(t.rows(everyone.ranks) for t in unit if t.group is not None)
        scatter = all_gather(everyone, wide * trained, hardware)
        whole += 2 * run.train.accumulation * gather + scatter
        longest = max(longest, gather + scatter)
    return whole, longest


def bucketed(size: float, at: Layout, hardware: Hardware) -> float:
    """Seconds of summing `size` bytes over a group, bucket by bucket."""
    whole, rest = divmod(size, BUCKET_BYTES)
    return whole * all_reduce(at, BUCKET_BYTES, hardware) + (all_reduce(at, rest, hardware) if rest else 0.0)


def at_batch(run: RunConfig, world: int, images: int | None) -> RunConfig:
    """`run` with so many images of each rank per optimiser step; None = the config's batch, shared by all."""
    if images is None:
        return run
    if images < 1 or images % run.train.accumulation:
        raise ConfigError(
            f"--batch {images}: images of each rank must be a multiple of train.accumulation={run.train.accumulation}"
        )
    return replace(run, train=replace(run.train, batch_size=images * world))
