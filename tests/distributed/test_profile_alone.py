"""A model's exchanges by themselves: the messages of a real step, and nothing that a later step would notice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
import torch
from micro import MICRO
from pool import Pool
from rich.console import Console

from swinmoe.comm import Message, listen
from swinmoe.commands.profile import show
from swinmoe.config import RunConfig
from swinmoe.config.io import build, merge
from swinmoe.parallel.execution import WeightsTravel
from swinmoe.parallel.replicas import SummedOverReplicas
from swinmoe.parallel.tokens_travel import TokensTravel
from swinmoe.profiling import model as module
from swinmoe.profiling.exchange_alone import exchange_alone, watch_passages
from swinmoe.profiling.model import profile_model
from swinmoe.runtime import make_accelerator

pytestmark = pytest.mark.distributed

SMALL: dict[str, Any] = {
    "model": {**MICRO, "moe_blocks": [[1], [1]], "drop_path_rate": 0.0, "moe": {"num_experts": 4, "top_k": 2}},
    "data": {"name": "digits"},
    "train": {"batch_size": 10, "steps": 1, "accumulation": 2},  # 2 and 3 images on the two ranks, unlike loads
    "parallel": {"ep_size": 2},
}


def subject_of(changes: dict[str, Any], backward: bool = True) -> module._Subject:
    run = build(RunConfig, merge(SMALL, changes))
    accelerator = make_accelerator(run.train.precision, timeout_minutes=1)
    return module._Bench(torch.device("cpu"), backward, 1, lambda text: None)._subject("small", run, accelerator)


def heard_in(step: Callable[[], Any]) -> list[Message]:
    with listen() as heard:
        step()
    return heard


def traffic(changes: dict[str, Any], backward: bool = True) -> tuple[list[Message], list[Message]]:
    """What this rank says in a whole step, and in its exchanges alone."""
    subject = subject_of(changes, backward)
    assert subject.alone is not None
    subject.alone()
    return heard_in(subject.step), heard_in(subject.alone)


def rows_of(messages: list[Message]) -> Counter[tuple[str, float]]:
    """Rows and weights that travel, without counts, statistics and sums of gradients."""
    gathered = "gathering expert weights"
    return Counter((m.what, m.bytes) for m in messages if m.operation == "all_to_all" or gathered in m.what)


def total(messages: list[Message]) -> float:
    return sum(m.bytes for m in messages)


PADDED = {"dispatcher": "padded", "capacity": {"train": {"kind": "fixed", "factor": 1.25}}}


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 16),  # 2 layers, 2 micro-batches, out and back, both ways
        ({"model": {"grad_checkpointing": True}}, 24),
        ({"model": {"grad_checkpointing": [0]}}, 20),
        ({"model": {"moe": PADDED}}, 16),
        ({"parallel": {"chunks": 2, "payload": "bf16"}, "model": {"grad_checkpointing": True}}, 48),
        ({"train": {"precision": "bf16"}, "model": {"grad_checkpointing": True}}, 24),
        ({"model": {"moe": {"num_experts": 1, "top_k": 1}}}, 16),  # two slices of one expert
        ({"parallel": {"shard_dense": True}}, 16),
        # nothing but weights: a gather each way, and one more where the backward pass gathers again
        ({"parallel": {"weight_group": 2}, "model": {"grad_checkpointing": [1]}}, 10),
    ],
    ids=str,
)
def test_alone_sends_what_a_step_sends(pool2: Pool, changes: dict[str, Any], count: int) -> None:
    for step, alone in pool2.run(traffic, changes):
        assert rows_of(alone) == rows_of(step) and total(alone) > 0
        assert len(alone) == count == rows_of(alone).total(), "and nothing else"
        assert total(alone) < total(step), "which also has counts, statistics and sums of gradients"


def test_alone_sends_in_two_stages(pool4: Pool) -> None:
    two_stages = {"ep_size": 4, "exchange": "2dh", "local_size": 2}
    for step, alone in pool4.run(traffic, {"train": {"batch_size": 12}, "parallel": two_stages}):
        assert rows_of(alone) == rows_of(step) and len(alone) == 32


def test_alone_sends_what_a_forward_pass_sends(pool2: Pool) -> None:
    for step, alone in pool2.run(traffic, {"model": {"grad_checkpointing": True}}, False):
        assert rows_of(alone) == rows_of(step) and len(alone) == 8


def test_activations_computed_again_send_half_as_much_again(pool2: Pool) -> None:
    """By hand: out, back, both gradients; and out and back once more."""
    plain = pool2.run(traffic, {})
    again = pool2.run(traffic, {"model": {"grad_checkpointing": True}})
    for (_, alone), (_, more) in zip(plain, again, strict=True):
        assert total(more) == 1.5 * total(alone)


def wide_rows_under_autocast() -> tuple[set[Any], list[Message], list[Message]]:
    """As norms on a GPU leave them: float32, which an exchange casts before they travel."""
    subject = subject_of({"train": {"precision": "bf16"}})
    layers = list(subject.arm.raw.moe_layers().values())
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
    passages = watch_passages(subject.step, layers)
    return {p.dtype for p in passages}, heard_in(subject.step), heard_in(exchange_alone(passages))


def test_alone_casts_what_a_step_casts(pool2: Pool) -> None:
    for dtypes, step, alone in pool2.run(wide_rows_under_autocast):
        assert dtypes == {torch.float32} and rows_of(alone) == rows_of(step)


def lines_of(changes: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Message]]:
    """A whole profile, and what this rank says in a step that is none of its own."""
    run = build(RunConfig, merge(SMALL, changes))
    lines = list(profile_model({"small": run}, rounds=2))
    return lines, heard_in(subject_of(changes).step)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_profile_says_what_is_hidden(pool2: Pool, checkpointing: bool) -> None:
    (lines, one), (same, other) = pool2.run(lines_of, {"model": {"grad_checkpointing": checkpointing}})
    dense, sparse = lines
    assert [line["exchange_ms"] for line in lines] == [line["exchange_ms"] for line in same]
    names = ("exposed_ms", "hidden_ms", "exchange_ms", "exchange_bytes", "bandwidth")
    assert {name: dense[name] for name in names} == dict.fromkeys(names)
    sent = sum(m.bytes for m in [*one, *other] if m.operation == "all_to_all") / 2
    assert sparse["exchange_bytes"] == sent > 0
    assert sparse["bandwidth"] == pytest.approx(sent / (sparse["exchange_ms"] / 1000))
    said = StringIO()
    show(lines, Console(file=said, width=200))
    (told,) = [text for text in said.getvalue().splitlines() if "exchange alone" in text]
    assert told.startswith("small: exchange alone ") and f" {sent / 1e6:.2f} MB sent by a rank of 2" in told
    assert sparse["hidden_ms"] == max(0.0, sparse["exchange_ms"] - sparse["exposed_ms"]) >= 0


def later_step(changes: dict[str, Any], times: int) -> dict[str, Any]:
    """The gradients of a step after `times` exchanges alone, as the optimiser gets them, and what those left."""
    subject = subject_of(changes)
    arm = subject.arm
    assert subject.alone is not None
    heard = [message for _ in range(times) for message in heard_in(subject.alone)]
    touched = [name for name, p in arm.raw.named_parameters() if p.grad is not None]
    executions = [layer.execution for layer in arm.raw.moe_layers().values()]
    inner = [e.then if isinstance(e, SummedOverReplicas) else e for e in executions]
    found: dict[str, Any] = {
        "summed": {m.what for m in heard if m.operation == "all_reduce"},
        "touched": touched,
        "due": [(e._due, e._sum) for e in executions if isinstance(e, SummedOverReplicas)],
        "inner": {type(e) for e in inner},
    }
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        gradients.update({n: p.grad.clone() for n, p in arm.raw.named_parameters() if p.grad is not None})

    arm.optimizer.register_step_pre_hook(keep)
    subject.step()
    return found | {"gradients": gradients}


@pytest.mark.parametrize("weight_group", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_later_steps_are_what_they_were(pool4: Pool, weight_group: int, checkpointing: bool) -> None:
    """Four ranks, two of which hold the same experts: sums over replicas are counted by passes."""
    changes = {
        "model": {"grad_checkpointing": checkpointing},
        "train": {"batch_size": 16},
        "parallel": {"weight_group": weight_group},
    }
    without, after = pool4.run(later_step, changes, 0), pool4.run(later_step, changes, 3)
    for plain, found in zip(without, after, strict=True):
        assert found["summed"] == set() and found["touched"] == []
        assert found["due"] == [(0, None)] * 2, "one for each layer"
        assert found["inner"] == {TokensTravel if weight_group == 1 else WeightsTravel}, "nobody listens any more"
        assert found["gradients"].keys() == plain["gradients"].keys() and found["gradients"]
        assert all(torch.equal(found["gradients"][name], g) for name, g in plain["gradients"].items())
