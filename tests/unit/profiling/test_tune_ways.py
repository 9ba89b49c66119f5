"""The search over ways to run experts, with times made up; and what it remembers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swinmoe.commands import tune_exchange
from swinmoe.commands.tune_exchange import ExchangeOptions, _config_with, _tune
from swinmoe.config import RunConfig
from swinmoe.config.io import build, load, with_overrides
from swinmoe.errors import ConfigError
from swinmoe.profiling.clock import Timing
from swinmoe.profiling.session import ProfileSession
from swinmoe.profiling.tune.remembered import RememberedWays, shape_of
from swinmoe.profiling.tune.ways import Way, search
from swinmoe.records import RunRecord

ROUNDS = 12


def sparse(**parallel: Any) -> RunConfig:
    tree = {"model": {"preset": "swin_moe_micro", "moe": {"num_experts": 4}}, "parallel": parallel}
    return build(RunConfig, tree)


def timed(cost: Callable[[Way], float], asked: list[list[Way]] | None = None) -> Any:
    """Times of every run's way, the same in all rounds but for a drift that all share."""

    def measure(runs: Mapping[str, RunConfig]) -> dict[str, Timing]:
        ways = {name: Way.of(run) for name, run in runs.items()}
        if asked is not None:
            asked.append(list(ways.values()))
        return {name: Timing(tuple(cost(way) * (1 + 0.1 * i) for i in range(ROUNDS))) for name, way in ways.items()}

    return measure


def cost(way: Way) -> float:
    """Tokens over four ranks win; padding costs; two stages in nodes of two win; four chunks win."""
    ms = {1: 30.0, 2: 20.0, 4: 10.0}[way.ep_size] + 5 * (way.weight_group - 1)
    ms += {"ragged": 0.0, "padded": 2.0}[way.dispatcher]
    ms -= {None: 0.0, 2: 1.0}[way.local_size]
    return ms - 0.5 * way.chunks


def test_choices_build_on_each_other():
    trials = search(sparse(), 4, timed(cost))
    assert [trial.choice for trial in trials] == ["ranks and what travels", "layout", "exchange", "chunks"]
    assert trials[-1].after == Way("ragged", 4, 1, "2dh", 2, 4)
    first = {(way.ep_size, way.weight_group) for way, _ in trials[0].tried}
    assert first == {(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)}
    assert trials[1].before == trials[0].after and trials[1].after == trials[0].after


def test_every_way_tried_can_be_run_and_comes_back_from_its_run():
    asked: list[list[Way]] = []
    search(sparse(), 8, timed(lambda way: 10.0 / way.ep_size + way.weight_group, asked))
    for way in (way for ways in asked for way in ways):
        assert Way.of(way.applied(sparse())) == way


def test_a_difference_that_chance_explains_changes_nothing():
    def measure(runs: Mapping[str, RunConfig]) -> dict[str, Timing]:
        return {name: Timing(tuple(10 + (i + place) % 2 for i in range(ROUNDS))) for place, name in enumerate(runs)}

    own = Way("padded", 2, 2)
    trials = search(own.applied(sparse()), 2, measure)
    assert trials[-1].after == own


def test_the_fastest_of_those_beyond_doubt_wins():
    trials = search(
        sparse(), 2, timed(lambda way: {(1, 1): 10.0, (2, 1): 9.0, (2, 2): 8.0}[way.ep_size, way.weight_group])
    )
    assert trials[0].after == Way("ragged", 2, 2)
    assert [trial.choice for trial in trials] == ["ranks and what travels", "layout"]  # no token travels


def test_on_one_process_the_layout_alone_is_a_choice():
    trials = search(sparse(), 1, timed(cost), dispatchers=["ragged", "padded"])
    assert [trial.choice for trial in trials] == ["layout"] and trials[-1].after == Way("ragged", 1)
    (only,) = search(sparse(), 1, timed(cost), dispatchers=["ragged"])
    assert only.after == Way("ragged", 1) and len(only.tried) == 1


def test_a_config_for_other_ranks_starts_from_what_is_possible():
    trials = search(sparse(ep_size=4), 2, timed(cost))
    assert trials[0].before == Way("ragged", 1) and trials[-1].after.ep_size == 2


def test_sizes_may_be_limited_and_must_be_possible():
    trials = search(sparse(), 4, timed(cost), ep_sizes=[2])
    assert trials[-1].after.ep_size == 2
    with pytest.raises(ConfigError, match=r"no ep_size of \[3\] is possible on 4 process"):
        search(sparse(), 4, timed(cost), ep_sizes=[3])


def test_a_rounded_payload_goes_where_no_token_travels():
    run = sparse(ep_size=2, payload="bf16")
    assert Way("ragged", 2, 2).applied(run).parallel.payload == "full"
    assert Way("ragged", 2, 1, chunks=2).applied(run).parallel.payload == "bf16"


@pytest.mark.parametrize("way", [Way("ragged", 1), Way("padded", 2, 2), Way("ragged", 2, 1, chunks=2)])
def test_a_config_with_a_rounded_payload_can_be_written_in_every_way(way: Way, tmp_path: Path):
    config, out = tmp_path / "run.yaml", tmp_path / "best.yaml"
    config.write_text("model: {preset: swin_moe_micro, moe: {num_experts: 4}}\nparallel: {ep_size: 4}\n")
    overrides = ["parallel.payload=bf16"]
    out.write_text(_config_with(config, overrides, way, []))
    assert load(RunConfig, out) == way.applied(load(RunConfig, config, overrides))


def test_it_remembers_shapes_apart(tmp_path: Path):
    ways = RememberedWays(tmp_path / "deep" / "exchange.json")
    run = sparse()
    shape = shape_of(run, 2, 2, "cpu", {"backward": True})
    assert ways.find(shape) is None
    best = Way("padded", 2, 1, chunks=2)
    ways.keep(shape, best, 12.5)
    assert RememberedWays(ways.path).find(shape) == best
    same = shape_of(replace(best.applied(run), name="other", seed=3), 2, 2, "cpu", {"backward": True})
    assert ways.find(same) == best  # names and the way itself are no part of a shape
    bigger = build(RunConfig, {"model": {"preset": "swin_moe_micro", "embed_dim": 64, "moe": {"num_experts": 4}}})
    for other in (
        shape_of(run, 4, 2, "cpu", {"backward": True}),
        shape_of(run, 2, 1, "cpu", {"backward": True}),
        shape_of(run, 2, 2, "gpu", {"backward": True}),
        shape_of(run, 2, 2, "cpu", {"backward": False}),
        shape_of(bigger, 2, 2, "cpu", {"backward": True}),
    ):
        assert ways.find(other) is None
    ways.keep(shape_of(bigger, 2, 2, "cpu", {}), Way("ragged", 1), 1.0)
    assert ways.find(shape) == best and len(json.loads(ways.path.read_text())["entries"]) == 2
    assert [path.name for path in ways.path.parent.iterdir()] == ["exchange.json"]


CHANGES = [
    {"parallel": {"payload": "bf16", "ep_size": 2}},
    {"parallel": {"zero": True}},
    {"parallel": {"shard_dense": True}},
    {"train": {"compile": True}},
    {"train": {"offload_activations": True}},
    {"train": {"tf32": True}},
    {"train": {"precision": "bf16"}},
    {"train": {"ema_decay": 0.9}},
    {"train": {"batch_size": 32}},
    {"train": {"accumulation": 2}},
    {"optim": {"clip_grad_norm": None}},
    {"optim": {"layer_decay": 0.9}},
    {"model": {"grad_checkpointing": True}},
    {"model": {"moe": {"capacity": {"train": {"kind": "fixed", "factor": 1.0}}}}},
]
NO_CHANGES = [
    {"name": "other", "seed": 3, "output_dir": "elsewhere"},
    {"train": {"epochs": 7, "steps": 9, "eval_batch_size": 8, "eval_every_epochs": None, "dead_expert_window": 5}},
    {"optim": {"base_lr": 0.5}, "data": {"limit": 9}, "log": {"every_steps": 1}},
    {"parallel": {"timeout_minutes": 1, "ep_size": 4, "weight_group": 2, "exchange": "2dh", "local_size": 2}},
    {"parallel": {"ep_size": 2, "chunks": 2}, "model": {"moe": {"dispatcher": "padded"}}},
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_step_changes_its_shape(change: dict[str, Any]):
    assert shape_of(with_overrides(sparse(), change), 2, 2, "cpu", {}) != shape_of(sparse(), 2, 2, "cpu", {})


@pytest.mark.parametrize("change", NO_CHANGES)
def test_what_does_not_leaves_it(change: dict[str, Any]):
    assert shape_of(with_overrides(sparse(), change), 2, 2, "cpu", {}) == shape_of(sparse(), 2, 2, "cpu", {})


def tuned(run: RunConfig, cache: Path) -> tuple[Way, bool]:
    """What the command takes on one process, and whether it measured."""
    way, trials = _tune(run, 1, ExchangeOptions(cache=cache), ProfileSession(torch.device("cpu"), 0, RunRecord(None)))
    return way, bool(trials)


def test_only_a_way_that_the_run_can_take_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measure = timed(lambda way: {"ragged": 3.0, "padded": 2.0, "gshard": 1.0}[way.dispatcher])
    monkeypatch.setattr(tune_exchange, "step_times", lambda runs, **options: measure(runs))
    cache, run = tmp_path / "exchange.json", sparse()
    best = Way("padded", 1)
    assert tuned(run, cache) == (best, True) and tuned(run, cache) == (best, False)
    for other in ({"ep_size": 2}, {"chunks": 2}, {"dispatcher": "gshard"}):
        text = json.loads(cache.read_text())
        (entry,) = text["entries"].values()
        entry["way"] |= other
        cache.write_text(json.dumps(text))
        assert tuned(run, cache) == (best, True)
    # A config that has another layout was measured with it, and this one would not be.
    own = with_overrides(run, {"model": {"moe": {"dispatcher": "gshard"}}})
    assert tuned(own, cache) == (Way("gshard", 1), True) and tuned(run, cache) == (best, False)


@pytest.mark.parametrize("text", ["", "[]", '{"entries": {"a": {"way": {"ep": 1}}}}'])
def test_a_file_of_something_else_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "exchange.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="does not hold remembered ways"):
        RememberedWays(path).find({})
