"""A thousand layers, meshes and token counts drawn at random, each held against the oracle in float64.

A case is drawn from its seed, alike on all ranks, and redrawn until the config accepts it. Default: every fourth case;
`SWINMOE_FULL=1`: all.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
import torch
from pool import Pool
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from swinmoe.config import (
    BalanceLossConfig,
    CapacityConfig,
    CapacityPolicy,
    ExpertConfig,
    MoEConfig,
    ParallelConfig,
    RouterConfig,
)
from swinmoe.errors import ConfigError
from swinmoe.moe import MoEMlp, RoutingStats
from swinmoe.parallel import (
    Mesh,
    apply_expert_parallel,
    global_sum,
    is_expert_parameter,
    make_mesh,
    sync_expert_gradients,
    take_local,
    use_exchange,
)
from swinmoe.verify.oracle import OracleMoEMlp

pytestmark = pytest.mark.distributed

CASES, CHUNK = 1000, 25
STRIDE = 1 if os.environ.get("SWINMOE_FULL") else 4
DIM, HIDDEN = 12, 12
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Case:
    cfg: MoEConfig
    parallel: ParallelConfig
    then: ParallelConfig
    """Another way to travel on the same mesh, taken for a second pass."""
    counts: tuple[int, ...]
    """Tokens per rank."""
    recompute: bool
    training: bool


def draw_case(seed: int, world: int) -> Case:
    """The case of a seed."""
    rng = Random(1000 * world + seed)
    ep_size = rng.choice([n for n in (1, 2, 2, 4, 4) if world % n == 0])
    while True:
        try:
            return _try_case(rng, world, ep_size)
        except ConfigError:
            continue


def _try_case(rng: Random, world: int, ep_size: int) -> Case:
    cfg = MoEConfig(
        num_experts=rng.choice([1, 2, 3, 4, 6, 8]),
        top_k=rng.choice([1, 2, 3]),
        router=RouterConfig(
            type=rng.choice(["linear", "cosine"]),
            score=rng.choice(["softmax", "sigmoid"]),
            normalize_gates=rng.random() < 0.5,
            noise=rng.choice([0.0, 1.0]),
            batch_prioritized=rng.random() < 0.5,
            bias_update_rate=rng.choice([0.0, 0.1]),
            proj_dim=4,
        ),
        capacity=CapacityConfig(train=_policy(rng), eval=_policy(rng)),
        losses=BalanceLossConfig(
            **{name: rng.choice([0.0, 0.3]) for name in ("gshard", "importance", "load", "importance_load", "z")},
            batch=rng.choice(["global", "local"]),
        ),
        experts=ExpertConfig(
            type=rng.choice(["gelu", "swiglu"]),
            hidden_ratio=rng.choice([None, 1 / 3]),
            fc1_bias=rng.random() < 0.7,
            fc2_bias=rng.choice(["learned", "frozen-zero", "none"]),
        ),
        shared_expert_ratio=rng.choice([0.0, 0.0, 0.5]),
        dispatcher=rng.choice(["ragged", "padded"]),
    )
    ways = [_way(rng, ep_size) for _ in range(2)]
    for way in ways:
        way.check_experts(cfg.num_experts)
    counts = tuple(rng.choice([0, 0, 1, rng.randrange(12), rng.randrange(30)]) for _ in range(world))
    return Case(cfg, ways[0], ways[1], counts, recompute=rng.random() < 0.3, training=rng.random() < 0.9)


def _policy(rng: Random) -> CapacityPolicy:
    kind = rng.choice(["dropless", "fixed", "bounded"])
    return CapacityPolicy(kind=kind, factor=rng.choice([0.2, 0.5, 1.0, 1.25]), min_slots=rng.choice([0, 1, 3]))


def _way(rng: Random, ep_size: int) -> ParallelConfig:
    exchange = rng.choice(["flat", "2dh"])
    return ParallelConfig(
        ep_size=ep_size,
        weight_group=rng.choice([1, 1, 2, 4]),
        exchange=exchange,
        local_size=rng.choice([1, 2, 4]) if exchange == "2dh" else None,
        chunks=rng.choice([1, 1, 2, 3]),
    )


_meshes: dict[tuple[int, int], Mesh] = {}


def mesh_of(way: ParallelConfig, world: int) -> Mesh:
    """One mesh per expert group size, whose process groups all cases share."""
    key = (world, way.ep_size)
    if key not in _meshes:
        _meshes[key] = make_mesh(ParallelConfig(ep_size=way.ep_size))
    return replace(_meshes[key], config=way)


def make_layer(cfg: MoEConfig, draw: torch.Generator) -> MoEMlp:
    """In float64 with every trainable parameter drawn anew, and a bias of the choice where there is one."""
    layer = MoEMlp(cfg, dim=DIM, hidden_dim=HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) / 2)
        if layer.router.expert_bias is not None:
            layer.router.expert_bias.copy_(0.2 * torch.randn(cfg.num_experts, generator=draw))
    return layer


def task_loss(x: Tensor, y: Tensor) -> Tensor:
    """A sum over tokens that weighs each output by its token, so that mixed-up rows do not cancel."""
    return (y * (x.detach().flip(-1) + 0.5).square()).sum() + 0.1 * y.square().sum()


def forward(layer: MoEMlp, x: Tensor, noise: Tensor | None, recompute: bool) -> tuple[Tensor, RoutingStats]:
    if not recompute:
        return layer(x, noise)
    *assigned, stats = layer.assign(x, noise)
    with set_checkpoint_early_stop(False):  # no exchange may be left half done
        return checkpoint(layer.carry, x, *assigned, use_reentrant=False), stats


def faults(seed: int, world: int) -> list[str]:
    """What differs from the oracle on this rank; a collective call."""
    case = draw_case(seed, world)
    mesh = mesh_of(case.parallel, world)
    draw = torch.Generator().manual_seed(seed)
    layer = make_layer(case.cfg, draw).train(case.training)
    oracle = OracleMoEMlp(copy.deepcopy(layer)).train(case.training)
    oracle.shares = case.counts
    everyone = torch.randn(sum(case.counts), DIM, generator=draw, dtype=torch.float64)
    noise = None
    if case.cfg.router.noise:
        noise = torch.randn(len(everyone), case.cfg.num_experts, generator=draw, dtype=torch.float64)
        noise = noise / case.cfg.num_experts
    first = sum(case.counts[: mesh.rank])
    mine = slice(first, first + case.counts[mesh.rank])

    whole = everyone.clone().requires_grad_()
    expected, said = oracle(whole, noise)
    (task_loss(whole, expected) + said.loss).backward()
    assert whole.grad is not None

    apply_expert_parallel(layer, mesh)
    shares = world if case.cfg.losses.batch == "local" else 1
    found = []
    for way in (case.parallel, case.then):
        use_exchange(layer, mesh, way)
        layer.zero_grad()
        x = everyone[mine].clone().requires_grad_()
        y, stats = forward(layer, x, None if noise is None else noise[mine], case.recompute)
        (task_loss(x, y) + stats.loss / shares).backward()
        sync_expert_gradients(layer, mesh)
        assert x.grad is not None
        pairs = {"output": (y, expected[mine]), "input gradient": (x.grad, whole.grad[mine])}
        pairs |= _gradients(layer, oracle, mesh)
        counted = global_sum(torch.stack([stats.routed, stats.kept]), mesh)
        pairs["choices"] = counted.double(), torch.stack([said.routed, said.kept]).double()
        largest = max(1.0, *(float(b.detach().abs().max()) for _, b in pairs.values() if b.numel()))
        for what, (a, b) in pairs.items():
            if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=TOLERANCE * largest):
                found.append(f"seed {seed}, {what}: {case}")
    return found


def _gradients(layer: MoEMlp, oracle: OracleMoEMlp, mesh: Mesh) -> dict[str, tuple[Tensor, Tensor]]:
    """(found, expected) by parameter: this rank's part of the experts, the sum over ranks of the rest."""
    wanted = dict(oracle.named_parameters())
    pairs = {}
    dense = {}
    for name, parameter in layer.named_parameters():
        if not parameter.requires_grad:
            continue
        full = wanted[name].grad
        expected = torch.zeros_like(wanted[name]) if full is None else full
        assert parameter.grad is not None, f"{name} has no gradient"
        if is_expert_parameter(parameter):
            pairs[name] = parameter.grad, take_local(expected, parameter, mesh)
        else:
            dense[name] = parameter.grad, expected
    total = global_sum(torch.cat([grad.flatten() for grad, _ in dense.values()]), mesh)
    sizes = [grad.numel() for grad, _ in dense.values()]
    for (name, (_, expected)), grad in zip(dense.items(), total.split(sizes), strict=True):
        pairs[name] = grad.view_as(expected), expected
    return pairs


def faults_of(seeds: list[int], world: int) -> list[str]:
    found = []
    for seed in seeds:
        try:
            found += faults(seed, world)
        except Exception as error:
            raise RuntimeError(f"seed {seed}: {draw_case(seed, world)}") from error
    return found


def _chunks(world: int) -> list[list[int]]:
    """Half of the cases on each of the two worlds."""
    seeds = list(range(0, CASES // 2, STRIDE))
    return [seeds[first : first + CHUNK] for first in range(0, len(seeds), CHUNK)]


@pytest.mark.parametrize("seeds", _chunks(2), ids=lambda seeds: f"from {seeds[0]}")
def test_two_processes(pool2: Pool, seeds: list[int]) -> None:
    assert pool2.run(faults_of, seeds, 2) == [[], []]


@pytest.mark.parametrize("seeds", _chunks(4), ids=lambda seeds: f"from {seeds[0]}")
def test_four_processes(pool4: Pool, seeds: list[int]) -> None:
    assert pool4.run(faults_of, seeds, 4) == [[], [], [], []]


def test_cases_are_of_all_kinds() -> None:
    cases = [draw_case(seed, 4) for seed in range(CASES // 2)]

    def share(holds: Any) -> float:
        return sum(map(bool, map(holds, cases))) / len(cases)

    assert share(lambda c: 0 in c.counts) > 0.5 and share(lambda c: len(set(c.counts)) > 2) > 0.5
    assert share(lambda c: c.parallel.ep_size > c.cfg.num_experts) > 0.1
    assert share(lambda c: c.parallel.weight_group > 1) > 0.1 and share(lambda c: c.parallel.chunks > 1) > 0.1
    assert share(lambda c: c.parallel.exchange == "2dh") > 0.1 and share(lambda c: c.parallel.ep_size == 1) > 0.1
    assert share(lambda c: c.parallel != c.then) > 0.4 and share(lambda c: c.recompute) > 0.2
    assert len({repr(case) for case in cases}) == len(cases)
