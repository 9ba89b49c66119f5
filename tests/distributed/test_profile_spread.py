"""Profiles over several processes: phases in every way of spreading experts, and the whole sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import MICRO
from pool import Pool

from swinmoe.config import MoEConfig, ParallelConfig, RunConfig
from swinmoe.config.io import build
from swinmoe.config.profile import LayerSweepConfig
from swinmoe.models import build_model
from swinmoe.moe import MoEMlp, phases
from swinmoe.parallel import apply_expert_parallel, make_mesh, no_sync
from swinmoe.profiling import take_turns
from swinmoe.profiling.layer import profile_layer
from swinmoe.profiling.model import profile_model
from swinmoe.profiling.session import profile_session
from swinmoe.profiling.timeline import watch
from swinmoe.records import read_records

pytestmark = pytest.mark.distributed


class _Spy(torch.autograd.Function):
    """The identity; keeps the phase it is called in, both ways."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seen: list[str]) -> torch.Tensor:
        ctx.seen = seen
        seen.append(phases.current())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.seen.append(phases.current())
        return grad, None


class _Crossings:
    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def crossed(self, direction: str, phase: str) -> None:
        self.heard.append((direction, phase))


def watched_layer(parallel: ParallelConfig, experts: int, dispatcher: str) -> dict[str, Any]:
    """A layer's step, alone and watched: are all bits equal, where do experts run, what is crossed?"""
    mesh = make_mesh(parallel, experts)
    layer = MoEMlp(MoEConfig(num_experts=experts, dispatcher=dispatcher), dim=8, hidden_dim=16)
    apply_expert_parallel(layer, mesh)
    # Rank 0 has no tokens: it takes part all the same.
    x = torch.randn(mesh.rank * 7, 8, generator=torch.Generator().manual_seed(mesh.rank), requires_grad=True)

    def step() -> list[torch.Tensor]:
        layer.zero_grad()
        x.grad = None
        with no_sync(layer):
            y, stats = layer(x)
            phases.turn(phases.BACKWARD)
            torch.autograd.backward([y.square().sum(), stats.loss])
        assert x.grad is not None
        return [y, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]

    alone = step()
    listener, seen = _Crossings(), []
    function = layer.experts.function
    layer.experts.function = lambda training: lambda rows, *rest: function(training)(_Spy.apply(rows, seen), *rest)  # type: ignore[method-assign]
    with phases.listen(listener):
        with_phases = step()
    taken = watch(step).read()
    return {
        "equal": all(torch.equal(a, b) for a, b in zip(alone, with_phases, strict=True)),
        "experts_in": set(seen),
        "calls": len(seen),
        "crossed": listener.heard,
        "read": {direction: set(own) for direction, own in taken.items()},
    }


FLAT = [
    *[("forward", p) for p in ("other", "route", "other", *phases.LAYER_PHASES[1:], "other")],
    *[("backward", p) for p in ("other", *reversed(phases.LAYER_PHASES), "other")],
]
CHUNKED = [
    *[("forward", p) for p in ("other", "route", "other", "scatter")],
    *[("forward", p) for p in ("exchange_out", "experts", "exchange_back") * 2],
    *[("forward", p) for p in ("gather", "other")],
    *[("backward", p) for p in ("other", "gather")],
    *[("backward", p) for p in ("exchange_back", "experts", "exchange_out") * 2],
    *[("backward", p) for p in ("scatter", "route", "other")],
]


@pytest.mark.parametrize("dispatcher", ["ragged", "padded"])
@pytest.mark.parametrize(
    ("parallel", "experts", "crossed"),
    [
        (ParallelConfig(ep_size=2), 4, FLAT),
        (ParallelConfig(ep_size=2, chunks=2), 4, CHUNKED),
        (ParallelConfig(ep_size=2, chunks=2), 2, CHUNKED),
        (ParallelConfig(ep_size=2), 1, FLAT),
        (ParallelConfig(ep_size=2, weight_group=2), 4, FLAT),
        (ParallelConfig(ep_size=1), 4, FLAT),
    ],
    ids=["flat", "by expert", "by share", "slices", "weights", "replicas"],
)
def test_phases_hold_however_experts_are_spread(
    pool2: Pool, parallel: ParallelConfig, experts: int, crossed: list[tuple[str, str]], dispatcher: str
) -> None:
    for found in pool2.run(watched_layer, parallel, experts, dispatcher):
        assert found["equal"]
        assert found["experts_in"] == {"experts"} and found["calls"] == 4 * parallel.chunks
        assert found["crossed"] == crossed
        assert found["read"] == {
            "forward": {*phases.LAYER_PHASES, "other"},
            "backward": {*phases.LAYER_PHASES, "other"},
        }


def test_phases_hold_in_two_stages(pool4: Pool) -> None:
    parallel = ParallelConfig(ep_size=4, exchange="2dh", local_size=2, chunks=2)
    for found in pool4.run(watched_layer, parallel, 8, "ragged"):
        assert found["equal"] and found["experts_in"] == {"experts"}
        assert found["crossed"] == CHUNKED


def slow_rank() -> list[float]:
    """Rank 1's step takes 50 ms, and so does the step."""
    import time

    rank = torch.distributed.get_rank()
    taken = take_turns({"one slow": lambda: time.sleep(0.05 * rank)}, 2, group=torch.distributed.group.WORLD)
    return list(taken["one slow"].ms)


def test_a_step_lasts_as_long_as_on_the_slowest_rank(pool2: Pool) -> None:
    first, second = pool2.run(slow_rank)
    assert first == second and min(first) >= 50


def sweep(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of a small sweep, as this rank has them."""
    small = {"tokens": (24,), "dim": (8,), "hidden": (16,), "rounds": 3}
    return list(profile_layer(LayerSweepConfig(**(small | settings))))


def test_a_sweep_over_two_processes(pool2: Pool) -> None:
    settings = {"experts": (2, 4), "dispatcher": ("ragged", "padded"), "ep_size": (1, 2), "weight_group": (1, 2)}
    first, second = pool2.run(sweep, settings)
    # Tokens cannot be kept from travelling where they do not travel: those combinations are left out.
    assert len(first) == 2 * 2 * 3 + 2
    assert [line["ms"] for line in first] == [line["ms"] for line in second]
    json.dumps(first)
    for line in first:
        base = next((other for other in first if other["name"] == line["baseline"]), None)
        if line["variant"]["dispatcher"] == "dense":
            assert line["baseline"] is None and base is None
            continue
        assert base is not None and base["variant"]["dispatcher"] == "dense"
        assert line["ranks"] == line["variant"]["ep_size"] and line["variant"]["world"] == 2
        assert line["rows"]["routed"] == line["rows"]["kept"] == 48 <= line["rows"]["computed"]
        passes = {direction: set(own) for direction, own in line["phases"].items()}
        assert passes == {key: {*phases.LAYER_PHASES, "other"} for key in ("forward", "backward")}
        assert line["instrumented_ms"] == pytest.approx(sum(sum(own.values()) for own in line["phases"].values()))
        spread = line["variant"]["ep_size"] == 2
        assert (line["exchange_ms"] is not None) == spread == (line["bandwidth"] is not None)
        if spread:
            assert line["hidden_ms"] == max(0.0, line["exchange_ms"] - line["exposed_ms"])
            assert line["bytes_sent"] > 0
        assert sum(line["memory"][name] for name in line["memory"] if name != "peak") == line["memory"]["peak"]


def test_bytes_are_those_of_the_rows_that_travel(pool2: Pool) -> None:
    """Balanced, half of each rank's 24 rows of 8 floats go to the other: out, back, and both gradients."""
    lines, _ = pool2.run(sweep, {"experts": (2,), "ep_size": (2,), "skew": (0.0,)})
    (line,) = [line for line in lines if line["baseline"]]
    rows = 4 * 12 * 8 * 4
    assert line["bandwidth"] * line["exchange_ms"] / 1000 == pytest.approx(rows)
    assert rows < line["bytes_sent"] < rows + 200, "and counts and balance statistics besides"
    assert line["balanced_ms"] == line["ms"]["median"]


def model_lines() -> list[dict[str, Any]]:
    """A small model's training steps, experts spread over two processes."""
    run = build(
        RunConfig,
        {
            "model": {**MICRO, "moe": {"num_experts": 4, "top_k": 1}},
            "data": {"name": "digits"},
            "train": {"batch_size": 6, "steps": 1, "accumulation": 2},
            "parallel": {"ep_size": 2},
        },
    )
    return list(profile_model({"small": run}, rounds=2))


def test_a_model_over_two_processes(pool2: Pool) -> None:
    first, second = pool2.run(model_lines)
    assert [line["ms"] for line in first] == [line["ms"] for line in second]
    dense, sparse = first
    assert (dense["ranks"], sparse["ranks"], sparse["variant"]["world"]) == (1, 2, 2)
    assert dense["exposed_ms"] is None
    exchanged = [own[name] for own in sparse["phases"].values() for name in own if name.startswith("exchange")]
    assert sparse["exposed_ms"] == pytest.approx(sum(exchanged))
    assert min(dense["bytes_sent"], sparse["bytes_sent"]) > 0
    assert sparse["phases"]["backward"]["exchange_out"] > 0 == dense["phases"]["backward"]["exchange_out"]
    assert sparse["rows"]["routed"] == sparse["rows"]["kept"]


DENSE = {
    "model": {**MICRO, "moe": None},
    "data": {"name": "digits"},
    "train": {"batch_size": 6, "steps": 1, "accumulation": 1},
}


def memory_of(shard_dense: bool) -> dict[str, int]:
    """Of a dense model's training step on two processes."""
    run = build(RunConfig, DENSE | {"parallel": {"shard_dense": shard_dense}})
    (line,) = profile_model({"dense": run}, rounds=1)
    memory: dict[str, int] = line["memory"]
    return memory


@pytest.mark.parametrize("shard_dense", [False, True], ids=["whole", "FSDP2"])
def test_a_rank_counts_what_it_has_of_a_parameter(pool2: Pool, shard_dense: bool) -> None:
    """Rows shared out evenly, one more for the first rank where they are odd; moments with a step count each."""
    model = build_model(build(RunConfig, DENSE).model)
    ranks = 2 if shard_dense else 1
    own = sum(-(-p.shape[0] // ranks) * p[0].nbytes for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    for memory in pool2.run(memory_of, shard_dense):
        assert memory["optimizer"] == 2 * own + 4 * len(list(model.parameters()))
        assert own + buffers <= memory["dense"] <= 2 * own + buffers, "and its gradients that are there at the peak"
        assert memory["peak"] == sum(memory[name] for name in memory if name != "peak")


def recorded(folder: Path) -> int:
    """As the command does it: the number of measurements that this rank made."""
    config = LayerSweepConfig(tokens=(24,), dim=(8,), hidden=(16,), ep_size=(2,), rounds=2)
    from swinmoe.profiling import session as module

    stop, module.stop_processes = module.stop_processes, lambda: None  # the pool's processes go on
    try:
        with profile_session(folder, {"experts": config.experts}) as session:
            session.begin("layer", "test", {"experts": 8})
            lines = list(profile_layer(config, session.device))
            for line in lines:
                session.records.write("measurement", **line)
    finally:
        module.stop_processes = stop
    return len(lines)


def test_rank_0_writes_the_records(pool2: Pool, tmp_path: Path) -> None:
    assert pool2.run(recorded, tmp_path / "out") == [2, 2]
    lines = read_records(tmp_path / "out" / "records.jsonl")
    assert [line["kind"] for line in lines] == ["profile", "measurement", "measurement"]
    assert lines[0]["environment"]["world_size"] == 2
