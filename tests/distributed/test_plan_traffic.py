"""What the plan says a rank sends, against what four gloo processes are heard to send under forced balance."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from pool import Pool

from swinmoe.comm import listen
from swinmoe.config import RunConfig
from swinmoe.config.io import build
from swinmoe.models import build_model
from swinmoe.parallel import (
    apply_expert_parallel,
    clip_grad_norm,
    make_mesh,
    sync_expert_gradients,
    unwrap,
    wrap_data_parallel,
)
from swinmoe.profiling.forced import ForcedRouter
from swinmoe.profiling.plan.hardware import load_hardware
from swinmoe.profiling.plan.predict import Scene, spreads_of
from swinmoe.profiling.plan.traffic import plan_traffic
from swinmoe.train import make_optimizer

pytestmark = pytest.mark.distributed

WORLD, IMAGES = 4, 2
MODEL: dict[str, Any] = {
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "patch_size": 2,
    "window_size": 4,
    "img_size": 16,
    "num_classes": 5,
    "moe": {"num_experts": 4, "top_k": 2},
    "moe_blocks": [[1], [1]],
}
WAYS: dict[str, dict[str, Any]] = {
    "tokens in a pair": {"ep_size": 2},
    "2dh in chunks": {"ep_size": 4, "exchange": "2dh", "local_size": 2, "chunks": 2},
    "weights": {"ep_size": 4, "weight_group": 4},
    "both, rounded": {"ep_size": 4, "weight_group": 2, "payload": "bf16"},
    "nothing": {"ep_size": 1},
    "zero": {"ep_size": 2, "zero": True},
    "fsdp": {"ep_size": 1, "shard_dense": True},
    "fsdp, zero over replicas": {"ep_size": 2, "shard_dense": True, "zero": True},
}


def run_of(parallel: dict[str, Any], model: dict[str, Any]) -> RunConfig:
    return build(
        RunConfig,
        {"model": {**MODEL, **model}, "parallel": parallel, "train": {"batch_size": WORLD * IMAGES}},
    )


def heard(parallel: dict[str, Any], model: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Bytes of everything that one step sends, by operation and purpose."""
    run = run_of(parallel, model)
    moe = run.model.moe
    assert moe is not None
    mesh = make_mesh(run.parallel, moe.num_experts)
    raw = build_model(run.model)
    apply_expert_parallel(raw, mesh)
    for layer in raw.moe_layers().values():
        forced = ForcedRouter(layer.router, layer.cfg.router.normalize_gates)
        forced.skew = 0.0
        layer.router = forced
    wrapped = wrap_data_parallel(raw, mesh)
    optimizer = make_optimizer(unwrap(wrapped), run.optim, mesh)

    def step() -> None:
        output = wrapped(torch.randn(IMAGES, 3, *run.model.img_size))
        (output.logits.sum() + output.aux_loss).backward()
        sync_expert_gradients(unwrap(wrapped), mesh)
        clip_grad_norm(unwrap(wrapped), 1.0, mesh)
        optimizer.step()

    step()  # DDP forms its buckets anew after the first pass
    with listen() as sent:
        step()
    total: Counter[tuple[str, str]] = Counter()
    for message in sent:
        total[message.operation, message.what.split(": ")[-1]] += message.bytes
    return {key: float(value) for key, value in total.items() if value}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", [{}, {"grad_checkpointing": True}], ids=["kept", "recomputed"])
def test_every_byte_is_planned(pool4: Pool, way: str, model: dict[str, Any]) -> None:
    run = run_of(WAYS[way], model)
    spreads = spreads_of(run, Scene(load_hardware("cpu"), WORLD, imbalance=1.0), IMAGES)
    for rank, sent in enumerate(pool4.run(heard, WAYS[way], model)):
        assert sent == pytest.approx(plan_traffic(run, spreads, WORLD, rank))
