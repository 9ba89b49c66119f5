"""Every way to spread a run over so many ranks, the fastest that fits first.

What may vary: expert-parallel size (with slices where it exceeds the experts), weights or tokens that travel, flat or
2DH, chunks; then, only where nothing fits, more micro-batches and recomputed activations. The model, the batch and the
optimiser stay what the config says: results do not change, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from swinmoe.config import ParallelConfig, RunConfig
from swinmoe.config.checks import divisors
from swinmoe.errors import ConfigError
from swinmoe.profiling.plan.predict import Prediction, Scene, at_batch, predict
from swinmoe.profiling.plan.work import expert_layers

CHUNKS = (1, 2, 4)
_NEUTRAL: dict[str, Any] = {
    "ep_size": 1, "weight_group": 1, "exchange": "flat", "local_size": None, "chunks": 1, "payload": "full",
}  # fmt: skip
LARGEST_GROUP = 512
"""Ranks in an expert group; beyond, messages are all latency and nothing is left to gain."""


@dataclass(frozen=True)
class Option:
    """One way, and what it would take."""

    run: RunConfig
    prediction: Prediction

    @property
    def overrides(self) -> dict[str, Any]:
        """Keys of the config that make a run be like this."""
        parallel = self.run.parallel
        keys: dict[str, Any] = {
            "parallel.ep_size": parallel.ep_size,
            "parallel.weight_group": parallel.weight_group,
            "parallel.exchange": parallel.exchange,
            "parallel.local_size": parallel.local_size,
            "parallel.chunks": parallel.chunks,
            "parallel.payload": parallel.payload,
            "train.batch_size": self.run.train.batch_size,
            "train.accumulation": self.run.train.accumulation,
            "model.grad_checkpointing": _plain(self.run.model.grad_checkpointing),
        }
        return keys


def layouts(run: RunConfig, scene: Scene) -> Iterator[ParallelConfig]:
    """Every `parallel` section that fits the model on the scene's ranks."""
    base = replace(run.parallel, **_NEUTRAL)
    layers = expert_layers(run.model)
    if not layers:
        yield base
        return
    node = scene.hardware.processes_per_node
    for ep in (size for size in divisors(scene.world) if size <= LARGEST_GROUP):
        if any(not _fits(layer.num_experts, layer.hidden, ep) for layer in layers):
            continue
        for group in divisors(ep):
            # weights of neighbours travel well inside a node only
            if group > node:
                continue
            still = group == ep
            one_stage = still or ep <= node or ep % node or node % group
            exchanges: tuple[Literal["flat", "2dh"], ...] = ("flat",) if one_stage else ("flat", "2dh")
            for exchange in exchanges:
                for chunks in (1,) if still else CHUNKS:
                    local = node if exchange == "2dh" else None
                    payload = "full" if still else run.parallel.payload
                    try:
                        config = replace(
                            base,
                            ep_size=ep,
                            weight_group=group,
                            exchange=exchange,
                            local_size=local,
                            chunks=chunks,
                            payload=payload,
                        )
                        for layer in layers:
                            config.check_experts(layer.num_experts)
                    except ConfigError:
                        continue
                    yield config


def _fits(num_experts: int, hidden: int, ep: int) -> bool:
    if ep <= num_experts:
        return num_experts % ep == 0
    return ep % num_experts == 0 and hidden % (ep // num_experts) == 0


def search(run: RunConfig, scene: Scene, batch: int | None = None) -> list[Option]:
    """All ways on the scene's ranks, those that fit first, fastest first.

    Args:
        run: the config; its `parallel` section is what is searched.
        scene: machine and ranks.
        batch: images of each rank per step; None = the config's batch, shared by all.

    Raises:
        ConfigError: the batch cannot be split over the ranks.
    """
    found = _tried(run, scene, batch, run.train.accumulation, run.model.grad_checkpointing)
    # Less memory for more time, only where it is needed
    if not any(option.prediction.fits for option in found):
        for accumulation, recomputed in _thriftier(run, scene.world, batch):
            found += _tried(run, scene, batch, accumulation, recomputed)
            if any(option.prediction.fits for option in found):
                break
    return sorted(found, key=lambda o: (not o.prediction.fits, o.prediction.seconds, o.prediction.memory.total))


def _tried(
    run: RunConfig, scene: Scene, batch: int | None, accumulation: int, recomputed: bool | tuple[int, ...]
) -> list[Option]:
    sized = at_batch(replace(run, train=replace(run.train, accumulation=1)), scene.world, batch)
    pieces = accumulation * scene.world
    if sized.train.batch_size % pieces:
        raise ConfigError(
            f"train.batch_size={sized.train.batch_size} cannot be split evenly over {scene.world} ranks and "
            f"{accumulation} micro-batches; give --batch, images of each rank, or a multiple of {pieces}"
        )
    train = replace(sized.train, accumulation=accumulation)
    model = replace(run.model, grad_checkpointing=recomputed)
    options = []
    for parallel in layouts(run, scene):
        way = replace(run, train=train, model=model, parallel=parallel)
        options.append(Option(way, predict(way, scene)))
    return options


def _thriftier(run: RunConfig, world: int, batch: int | None) -> Iterator[tuple[int, bool | tuple[int, ...]]]:
    """(micro-batches, recompute), from little to much loss of time: recomputing costs a third, more micro-batches
    nearly nothing until they are small."""
    images = batch if batch is not None else run.train.batch_size // world
    smaller = [n for n in divisors(images) if n > run.train.accumulation and n % run.train.accumulation == 0]
    for accumulation in smaller:
        if images // accumulation >= 8:
            yield accumulation, run.model.grad_checkpointing
    if not run.model.recomputes_all:
        for accumulation in (run.train.accumulation, *smaller):
            yield accumulation, True


def _plain(value: bool | tuple[int, ...]) -> bool | list[int]:
    return value if isinstance(value, bool) else list(value)
