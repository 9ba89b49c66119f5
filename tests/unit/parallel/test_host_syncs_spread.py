"""How often the host waits for the device where experts are spread: never in the padded layout, once in the ragged one.

Shown as for one process (`unit/moe/test_host_syncs.py`), in a process group in which nothing travels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from host_questions import FIXED, PADDED, RAGGED, asked
from torch import Tensor

from swinmoe.config import CapacityConfig, CapacityPolicy, MoEConfig, ParallelConfig
from swinmoe.moe import MoEMlp, expert_mlp
from swinmoe.parallel import apply_expert_parallel, make_mesh
from swinmoe.runtime.pretend import pretended_processes

WAYS = {
    "flat": ParallelConfig(ep_size=2),
    "two stages": ParallelConfig(ep_size=4, exchange="2dh", local_size=2),
    "chunks of experts": ParallelConfig(ep_size=2, chunks=2),
    "chunks of rows, rounded": ParallelConfig(ep_size=4, chunks=2, payload="bf16"),
    "slices": ParallelConfig(ep_size=8),
    "tokens and weights": ParallelConfig(ep_size=4, weight_group=2),
}


@contextmanager
def spread(cfg: MoEConfig, way: ParallelConfig, device: str) -> Iterator[MoEMlp]:
    """A layer over two groups of ranks, seen from the last."""
    with pretended_processes(2 * way.ep_size, rank=2 * way.ep_size - 1):
        layer = MoEMlp(cfg, dim=16, hidden_dim=32, device=device)
        apply_expert_parallel(layer, make_mesh(way, cfg.num_experts))
        yield layer


def step(layer: MoEMlp, x: Tensor) -> None:
    y, stats = layer(x)
    (y.square().sum() + stats.loss).backward()


@pytest.mark.parametrize("way", WAYS)
def test_the_padded_layout_asks_nothing(way: str) -> None:
    """The slots are agreed on between hosts. On the meta device whatever asks raises."""
    with spread(PADDED, WAYS[way], "meta") as layer:
        x = torch.empty(3, 8, 16, device="meta", requires_grad=True)
        step(layer, x)
    assert x.grad is not None and all(p.grad is not None for p in layer.parameters())


def test_the_ragged_layout_asks_the_device() -> None:
    """That meta tensors do raise."""
    with spread(RAGGED, WAYS["flat"], "meta") as layer, pytest.raises(NotImplementedError, match="meta"):
        layer(torch.empty(24, 16, device="meta"))


@pytest.mark.parametrize("policy", [CapacityPolicy(), FIXED, CapacityPolicy(kind="fixed", factor=0.5)])
@pytest.mark.parametrize(("dispatcher", "questions"), [("ragged", ["cpu"]), ("padded", [])])
@pytest.mark.parametrize("way", WAYS)
def test_questions_in_a_step(
    monkeypatch: pytest.MonkeyPatch, way: str, dispatcher: str, questions: list[str], policy: CapacityPolicy
) -> None:
    """The counts of all ranks are copied once, forward, whatever travels how and in how many parts."""
    if dispatcher == "padded" and policy.kind != "fixed":
        questions = ["aten._local_scalar_dense.default"]  # how long the longest queue is
    monkeypatch.setattr(expert_mlp, "blocked_mlp", expert_mlp.grouped_mlp)  # as GPUs go through the experts
    monkeypatch.setattr("swinmoe.comm.all_to_all.link_of", lambda group: None)  # and between ranks
    cfg = replace(RAGGED, dispatcher=dispatcher, capacity=CapacityConfig(train=policy))
    with spread(cfg, WAYS[way], "cpu") as layer:
        x = torch.randn(24, 16, requires_grad=True)
        with asked(monkeypatch, x, *layer.parameters()) as found:
            step(layer, x)
    assert found == questions
