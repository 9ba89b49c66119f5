"""A tiny Swin-MoE trained on several processes against the same training on one: same batches, same numbers.

Every rank also runs the one-process training, so that nothing but the mesh differs.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pool import Pool
from torch import Tensor, nn

from swinmoe.config import BalanceLossConfig, ModelConfig, MoEConfig, ParallelConfig
from swinmoe.models import SwinTransformer
from swinmoe.parallel import (
    Mesh,
    apply_expert_parallel,
    clip_grad_norm,
    gather_full,
    global_sum,
    is_expert_parameter,
    make_mesh,
    no_sync,
    sync_expert_gradients,
    unwrap,
    wrap_data_parallel,
)

pytestmark = pytest.mark.distributed

STEPS, BATCH, CLASSES, CLIP, RATE = 20, 12, 4, 0.5, 3e-3
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Case:
    ep_size: int = 2
    shares: tuple[int, ...] = (6, 6)
    """Images per rank of each step's batch; unequal and zero shares are legal."""
    layout: str = "ragged"
    top_k: int = 1
    accumulation: int = 1
    accelerate: bool = False
    checkpointing: bool = False
    dtype: torch.dtype = torch.float64
    steps: int = STEPS


def build(case: Case) -> SwinTransformer:
    moe = MoEConfig(
        num_experts=4,
        top_k=case.top_k,
        dispatcher=case.layout,
        losses=BalanceLossConfig(gshard=0.05, importance=0.02),
    )
    cfg = ModelConfig(
        style="v2",
        img_size=(8, 8),
        patch_size=(2, 2),
        window_size=(2, 2),
        num_classes=CLASSES,
        embed_dim=8,
        depths=(2, 2),
        num_heads=(1, 2),
        drop_path_rate=0.0,
        res_post_norm_init=0.5,
        grad_checkpointing=case.checkpointing,
        moe=moe,
        moe_blocks=((1,), (1,)),
    )
    return SwinTransformer(cfg, seed=3).to(case.dtype)


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images of four patterns under noise, and which pattern it is."""
    patterns = torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draw = torch.Generator().manual_seed(100 + step)
    labels = torch.randint(CLASSES, (BATCH,), generator=draw)
    noise = torch.randn(BATCH, 3, 8, 8, generator=draw, dtype=torch.float64)
    return (patterns[labels] + 0.3 * noise).to(dtype), labels


@dataclass
class Trained:
    model: nn.Module
    losses: list[float]
    norms: list[float]


def train(case: Case, mesh: Mesh) -> Trained:
    """AdamW with decay and clipping. A step's batch is split into micro-batches first, then over ranks."""
    model: nn.Module = build(case)
    apply_expert_parallel(model, mesh)
    prepare = None
    if case.accelerate and mesh.world > 1:
        from swinmoe.runtime import make_accelerator

        prepare = make_accelerator("fp64" if case.dtype == torch.float64 else "fp32", cpu=True)
    model = wrap_data_parallel(model, mesh, prepare)
    optimizer = torch.optim.AdamW(unwrap(model).parameters(), lr=RATE, weight_decay=0.05)
    shares = case.shares if mesh.world > 1 else (BATCH,)
    losses, norms = [], []
    for step in range(case.steps):
        images, labels = batch(step, case.dtype)
        total = torch.zeros((), dtype=case.dtype)
        micro = BATCH // case.accumulation
        for index in range(case.accumulation):
            # Rank r's share of each micro-batch; shares are given for the whole step.
            first = index * micro + sum(shares[: mesh.rank]) // case.accumulation
            mine = slice(first, first + shares[mesh.rank] // case.accumulation)
            last = index == case.accumulation - 1
            with torch.enable_grad() if last else no_sync(model):
                output = model(images[mine])
                loss = F.cross_entropy(output.logits, labels[mine], reduction="sum") / BATCH
                (loss + output.aux_loss / case.accumulation).backward()
            total += loss.detach()
            if index == 0:
                balance = output.aux_loss.detach()
        sync_expert_gradients(unwrap(model), mesh)
        norms.append(float(clip_grad_norm(unwrap(model), CLIP, mesh)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(global_sum(total, mesh) + balance))
    return Trained(unwrap(model), losses, norms)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()


def against_one_process(case: Case) -> dict[str, Any]:
    """Largest differences from one process, and what must be bit-equal between ranks."""
    mesh = make_mesh(ParallelConfig(ep_size=case.ep_size), 4)
    alone, spread = train(case, Mesh()), train(case, mesh)
    differences = {
        name: float((gather_full(found, found, mesh) - expected).detach().abs().max())
        for (name, found), (_, expected) in zip(
            spread.model.named_parameters(), alone.model.named_parameters(), strict=True
        )
    }
    moved = {
        name: float((expected - initial).detach().abs().max())
        for (name, expected), initial in zip(alone.model.named_parameters(), build(case).parameters(), strict=True)
    }
    parameters = dict(spread.model.named_parameters())
    return {
        "parameters": max(differences.values()),
        "losses": max(abs(a - b) for a, b in zip(alone.losses, spread.losses, strict=True)),
        "norms": max(abs(a - b) for a, b in zip(alone.norms, spread.norms, strict=True)),
        "smallest norm": min(alone.norms),
        "fall": 1 - sum(alone.losses[-3:]) / sum(alone.losses[:3]),
        "still": [name for name, distance in moved.items() if distance == 0],
        "norm bits": [norm.hex() for norm in spread.norms],
        "dense bits": {n: digest(p) for n, p in parameters.items() if not is_expert_parameter(p)},
        "expert bits": {n: digest(p) for n, p in parameters.items() if is_expert_parameter(p)},
        "place": (mesh.replica, mesh.ep_rank),
    }


def check(results: list[dict[str, Any]], tolerance: float = TOLERANCE) -> None:
    for result in results:
        assert result["smallest norm"] > CLIP, "clipping was meant to act at every step"
        assert result["fall"] >= 0.1, "the loss was meant to fall"
        assert not result["still"], "every parameter was meant to move"
        for what in ("parameters", "losses", "norms"):
            assert result[what] <= tolerance, f"{what} are off by {result[what]:.2e}"
        assert result["norm bits"] == results[0]["norm bits"]
        assert result["dense bits"] == results[0]["dense bits"]
        twins = [other for other in results if other["place"][1] == result["place"][1]]
        assert all(twin["expert bits"] == result["expert bits"] for twin in twins)


@pytest.mark.parametrize("layout", ["ragged", "padded"])
def test_experts_on_two_processes_train_as_on_one(pool2: Pool, layout: str) -> None:
    """Acceptance: expert-parallel on 2 processes, float64, clipping active, 20 steps, ≤ 1e-10."""
    check(pool2.run(against_one_process, Case(layout=layout)))


@pytest.mark.parametrize(
    "case",
    [
        Case(shares=(12, 0), top_k=2, steps=8),
        Case(shares=(8, 4), accumulation=2, accelerate=True, steps=8),
        Case(ep_size=1, shares=(8, 4), accumulation=2, accelerate=True, steps=8),
        Case(checkpointing=True, steps=8),
    ],
    ids=["an idle rank", "accumulation under accelerate", "data-parallel", "recomputed activations"],
)
def test_other_ways_to_use_two_processes(pool2: Pool, case: Case) -> None:
    check(pool2.run(against_one_process, case))


@pytest.mark.parametrize(
    "case",
    [
        Case(ep_size=2, shares=(3, 5, 0, 4)),
        Case(ep_size=4, shares=(3, 3, 3, 3), layout="padded", steps=8),
        Case(ep_size=1, shares=(3, 3, 3, 3), steps=8),
    ],
    ids=["replicas of groups", "one group of four", "data-parallel"],
)
def test_four_processes(pool4: Pool, case: Case) -> None:
    check(pool4.run(against_one_process, case))


def averaged_model() -> bool:
    """An EMA made by deep copy follows a spread model and evaluates on all ranks."""
    mesh = make_mesh(ParallelConfig(ep_size=2), 4)
    case = Case()
    model = build(case)
    apply_expert_parallel(model, mesh)
    average = copy.deepcopy(model).eval()
    images, _ = batch(0, case.dtype)
    mine = slice(0, 5) if mesh.rank == 0 else slice(5, 5)  # rank 1 evaluates an empty batch
    with torch.no_grad():
        logits = average(images[mine]).logits
        expected = build(case).eval()(images[:5]).logits
    return logits.shape[0] == 0 if mesh.rank else bool((logits - expected).abs().max() < TOLERANCE)


def test_an_average_of_a_spread_model_evaluates(pool2: Pool) -> None:
    assert pool2.run(averaged_model) == [True, True]
