"""Sweeps: all combinations that can be, and errors that say why others cannot."""

from __future__ import annotations

from typing import Any

import pytest

from swinmoe.commands.profile import runs_of, several
from swinmoe.config.io import build
from swinmoe.config.profile import LayerSweepConfig, LayerWorkload, ModelSweepConfig, listed
from swinmoe.errors import ConfigError
from swinmoe.profiling.layer import _names


def test_every_combination_once() -> None:
    config = build(LayerSweepConfig, listed({"experts": [4, 8], "capacity": [1, "fixed 1.0", "dropless"], "top_k": 2}))
    workloads, refused = config.workloads()
    assert not refused
    assert [(w.experts, w.capacity) for w in workloads] == [
        (4, "fixed 1"),
        (4, "dropless"),
        (8, "fixed 1"),
        (8, "dropless"),
    ]


def test_what_cannot_be_is_left_out_and_named() -> None:
    config = LayerSweepConfig(ep_size=(1, 2, 3), chunks=(1, 2))
    workloads, refused = config.workloads()
    assert [(w.ep_size, w.chunks) for w in workloads] == [(1, 1), (2, 1), (2, 2)]
    assert len(refused) == 2
    assert any("chunks=2 has no meaning" in text for text in refused)
    assert any("ep_size=3 does not divide experts=8" in text for text in refused)


@pytest.mark.parametrize(
    ("given", "named"),
    [("dropless", "dropless"), ("1.25", "fixed 1.25"), ("fixed 1.0", "fixed 1"), ("bounded:2", "bounded 2")],
)
def test_capacities_have_one_name(given: str, named: str) -> None:
    workload = LayerWorkload(capacity=given)
    assert workload.capacity == named
    assert (f"{workload.policy().kind} {workload.policy().factor:g}" if named != "dropless" else "dropless") == named


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 0}, "num_experts=0"),
        ({"tokens": 0}, "profile.tokens=0 must be at least 1"),
        ({"capacity": "full"}, "capacity 'full' is not possible; use dropless"),
        ({"capacity": "fixed -1"}, "capacity 'fixed -1'"),
        ({"skew": -1}, "profile.skew=-1.0 must be at least 0"),
        ({"skew": "zipf"}, "skew"),
        ({"top_k": 9}, "moe.top_k=9"),
        ({"rounds": 0}, "profile.rounds=0"),
        ({"threads": 0}, "profile.threads=0"),
        ({"experts": []}, "profile.experts is an empty list"),
        ({"name": "a/b"}, "not a plain folder name"),
        ({"expert": 8}, "unknown config key 'expert'; did you mean 'experts'"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        build(LayerSweepConfig, listed(changes)).workloads()


def test_names_say_what_is_unusual_and_differ() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"chunks": 2},
        {"exchange": "2dh", "local_size": 2},
        {"exchange": "2dh"},
        {"weight_group": 2, "skew": 0.0},
        {"payload": "bf16", "precision": "bf16"},
        {"tokens": 64, "capacity": "1"},
    ]
    names = _names([LayerWorkload(**({"ep_size": 4} | change)) for change in changes])
    assert list(names.values()) == [
        "ragged E8 k1 dropless, T2304, ep 4",
        "ragged E8 k1 dropless, T2304, ep 4, 2 chunks",
        "ragged E8 k1 dropless, T2304, ep 4, 2dh, nodes of 2",
        "ragged E8 k1 dropless, T2304, ep 4, 2dh",
        "ragged E8 k1 dropless, T2304, ep 4, weights of 2, skew 0",
        "ragged E8 k1 dropless, T2304, ep 4, bf16 sent, bf16",
        "ragged E8 k1 fixed 1, T64, ep 4",
    ]


def test_values_are_read_as_yaml_reads_them() -> None:
    assert several("8,32") == [8, 32]
    assert several("router,0,1.5") == ["router", 0, 1.5]
    assert several("null,2") == [None, 2]
    assert several("[0, 1],[0],true") == [[0, 1], [0], True]
    assert several("{kind: fixed, factor: 2}") == [{"kind": "fixed", "factor": 2}]


@pytest.mark.parametrize("text", ["[0,1],[0", "8,,16", "8]", "a: b: c", "\t@"])
def test_what_is_no_list_of_values_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no list of values with commas between \(.*write 8,32 or, where"):
        several(text)


def test_model_sweeps_lay_their_settings_on_the_run() -> None:
    config = ModelSweepConfig(
        run="configs/debug/digits_swin_moe.yaml",
        set={"train.batch_size": 8},
        vary={"model.moe.num_experts": (4, 8), "model.moe.top_k": (1, 2)},
    )
    found = runs_of(config, ["seed=7"])
    runs = found.runs
    assert found.varied["debug_digits_swin_moe, num_experts 8, top_k 1"] == {
        "model.moe.num_experts": 8,
        "model.moe.top_k": 1,
    }
    assert next(iter(runs)) == "debug_digits_swin_moe, num_experts 4, top_k 1"
    assert [(run.model.moe.num_experts, run.model.moe.top_k) for run in runs.values() if run.model.moe] == [
        (4, 1),
        (4, 2),
        (8, 1),
        (8, 2),
    ]
    assert {(run.train.batch_size, run.seed) for run in runs.values()} == {(8, 7)}


def test_what_cannot_be_in_a_models_sweep_is_named_and_left_out() -> None:
    vary: dict[str, tuple[Any, ...]] = {"model.moe.num_experts": (1, 4), "model.moe.top_k": (1, 2)}
    config = ModelSweepConfig(run="configs/debug/digits_swin_moe.yaml", vary=vary)
    found = runs_of(config, [])
    assert [name.partition(", ")[2] for name in found.runs] == [
        "num_experts 1, top_k 1",
        "num_experts 4, top_k 1",
        "num_experts 4, top_k 2",
    ]
    assert set(found.runs) == set(found.varied)
    (why,) = found.left_out
    assert why.startswith("num_experts 1, top_k 2: ") and "moe.top_k=2 is not possible" in why
    with pytest.raises(ConfigError, match=r"moe\.top_k=2 is not possible"):
        runs_of(ModelSweepConfig(run=config.run, vary={"model.moe.num_experts": (1,), "model.moe.top_k": (2,)}), [])
