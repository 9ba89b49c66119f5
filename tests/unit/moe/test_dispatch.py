"""Queues, capacity and plans, small enough to check by hand."""

from typing import Any

import pytest
import torch

from swinmoe import native
from swinmoe.config import CapacityPolicy
from swinmoe.errors import ConfigError
from swinmoe.moe import capacity, require_slots
from swinmoe.moe.dispatch import plan, queue
from swinmoe.moe.dispatchers import base
from swinmoe.moe.types import Routing


def routing(ids, probs=None, experts=2) -> Routing:
    ids = torch.tensor(ids)
    probs = torch.full((len(ids), experts), 0.5) if probs is None else torch.tensor(probs)
    return Routing(ids, probs.gather(1, ids), probs, probs, probs, 0.0)


def test_two_groups_of_three_tokens_and_two_experts():
    """The example to check by hand: each group (rank) has capacity 1·int(1·ceil(3/2)) = 2 slots per expert.

    Group A: tokens choose 0, 0, 0. The third finds expert 0 full.
    Group B: tokens choose 1, 0, 1. Nobody is dropped; rows are sorted by expert: token 1, then 0 and 2.
    """
    policy = CapacityPolicy(kind="fixed", factor=1.0)
    limit = capacity(policy, num_tokens=3, num_experts=2, top_k=1)
    assert limit == 2

    a_routing = routing([[0], [0], [0]])
    a = queue(a_routing, 2, limit)
    assert a.slot.tolist() == [[0], [1], [2]]
    assert a.kept.tolist() == [[True], [True], [False]]
    assert (a.routed.tolist(), a.counts.tolist()) == ([3, 0], [2, 0])
    assert plan(a_routing, a, rows=2).row.tolist() == [0, 1]
    assert plan(a_routing, a, slots=2).row.tolist() == [0, 1, -1, -1]

    b_routing = routing([[1], [0], [1]])
    b = queue(b_routing, 2, limit)
    assert b.slot.tolist() == [[0], [0], [1]]
    assert b.kept.tolist() == [[True], [True], [True]]
    assert (b.routed.tolist(), b.counts.tolist()) == ([1, 2], [1, 2])
    ragged = plan(b_routing, b, rows=3)
    assert ragged.row.tolist() == [1, 0, 2]
    assert ragged.position.tolist() == [[1], [0], [2]]
    padded = plan(b_routing, b, slots=2)
    assert padded.row.tolist() == [1, -1, 0, 2]
    assert padded.position.tolist() == [[2], [0], [3]]


def test_second_choices_queue_behind_all_first_choices():
    r = routing([[0, 1], [1, 0], [0, 1]])
    q = queue(r, 2, 2)
    # Expert 0: first choices of tokens 0 and 2, then token 1's second. Expert 1: token 1, then 0 and 2.
    assert q.slot.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert q.kept.tolist() == [[True, True], [True, False], [True, False]]
    assert q.routed.tolist() == [3, 3]
    assert q.counts.tolist() == [2, 2]
    assert plan(r, q, rows=4).row.tolist() == [0, 4, 2, 1]  # t·K + k, sorted by (expert, slot)


def test_batch_priority_lets_the_surest_token_first():
    r = routing([[0], [0], [0]], probs=[[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]])
    q = queue(r, 2, 2, batch_prioritized=True)
    assert q.slot.tolist() == [[2], [0], [1]]
    assert q.kept.tolist() == [[False], [True], [True]]


def test_without_a_limit_nothing_is_masked():
    r = routing([[0], [0], [1]])
    assert queue(r, 2, None).kept is None
    assert queue(r, 2, 3).kept is None  # no queue is longer than T
    assert queue(r, 2, 2).kept.all()


@pytest.mark.parametrize(
    ("factor", "tokens", "experts", "top_k", "min_slots", "slots"),
    [
        (1.0, 3, 2, 1, 1, 2),
        (1.25, 64, 8, 1, 1, 10),
        (1.25, 64, 8, 2, 1, 20),
        (1.25, 41, 8, 2, 1, 14),  # ceil(41/8) = 6, int(7.5) = 7, and only then times k
        (0.5, 4, 8, 1, 1, 1),  # Tutel's 0 slots, at which its layer fails
        (0.5, 4, 8, 1, 0, 0),
        (0.5, 4, 8, 2, 3, 3),
        (1.0, 0, 8, 1, 1, 1),
    ],
)
def test_capacity_formula(factor, tokens, experts, top_k, min_slots, slots):
    policy = CapacityPolicy(kind="fixed", factor=factor, min_slots=min_slots)
    assert capacity(policy, tokens, experts, top_k) == slots
    assert capacity(CapacityPolicy(kind="bounded", factor=factor, min_slots=min_slots), tokens, experts, top_k) == slots
    assert capacity(CapacityPolicy(kind="dropless", factor=factor), tokens, experts, top_k) is None


def test_a_policy_without_slots_is_refused():
    require_slots(CapacityPolicy(kind="fixed", factor=0.5, min_slots=0), 16, 8, 1)
    require_slots(CapacityPolicy(kind="dropless", min_slots=0), 4, 8, 1)
    with pytest.raises(ConfigError, match=r"factor 0\.5 gives every expert 0 slots at 4 tokens.*min_slots >= 1"):
        require_slots(CapacityPolicy(kind="fixed", factor=0.5, min_slots=0), 4, 8, 1)


@pytest.mark.usefixtures("expert_kernel")
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(("limit", "slots"), [(None, None), (2, None), (2, 2)])
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("spread", [False, True])
def test_kernels_say_what_the_plain_operators_say(
    top_k: int, limit: int | None, slots: int | None, prioritized: bool, spread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queues, rows, sums and all gradients, with dropped choices and empty rows; `spread`: a gradient of stride 0."""
    gen = torch.Generator().manual_seed(top_k)
    ids = torch.stack([torch.randperm(4, generator=gen)[:top_k] for _ in range(7)])
    gates = torch.rand(7, top_k, generator=gen)
    decided = Routing(ids, gates, *(torch.rand(7, 4, generator=gen) for _ in range(3)), 0.0)
    x, slope = torch.randn(7, 5, generator=gen), torch.randn(7, 5, generator=gen)
    called = []
    for name in ("line_up", "give_rows", "take_rows", "sum_choices", "sum_choices_backward"):
        original = getattr(native, name)

        def spy(*given: Any, name: str = name, original: Any = original, **named: Any) -> Any:
            called.append(name)
            return original(*given, **named)

        monkeypatch.setattr(native, name, spy)
    found = []
    for allowed in (True, False):
        queues = queue(decided, 4, limit, batch_prioritized=prioritized, native=allowed)
        layout = plan(decided, queues, rows=int(queues.counts.sum()), slots=slots, native=allowed)
        leaves = [x.clone().requires_grad_(), gates.clone().requires_grad_()]
        rows = base.take_rows(leaves[0], layout)
        rows.retain_grad()
        y = base.combine_rows(rows, leaves[1], layout)
        (y.sum() if spread else (y * slope).sum()).backward()
        indices = [queues.slot, queues.routed, queues.counts, layout.row, layout.position]
        found.append([*indices, rows, y, rows.grad, *(leaf.grad for leaf in leaves)])
        # Going back, tokens add their rows up as `sum_choices` does.
        once = ["line_up", "give_rows", "take_rows", "sum_choices", "sum_choices_backward", "sum_choices"]
        assert called == once * allowed
        called.clear()
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)
        assert plain.abs().sum() > 0


def test_kernels_are_for_single_precision_outside_graphs() -> None:
    x, ids = torch.randn(2, 3), torch.tensor([[0], [1]])
    there = native.why_no_kernels() == ""
    assert native.can_walk(x, x) == native.can_walk(ids, dtype=torch.int64) == there
    for other in (x.bfloat16(), x.double(), x.to("meta"), torch.nn.Parameter(x), ids):
        assert not native.can_walk(x, other)
    for other in (x, ids.int(), ids.to("meta")):
        assert not native.can_walk(other, dtype=torch.int64)
