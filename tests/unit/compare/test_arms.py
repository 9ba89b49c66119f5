"""Arms from one config, and how long each trains."""

from __future__ import annotations

from typing import Any

import pytest

from swinmoe.compare.arms import match_lengths, resolve_arms
from swinmoe.config import CompareConfig
from swinmoe.config.io import build
from swinmoe.errors import ConfigError
from swinmoe.models.counts import count

BASE: dict[str, Any] = {
    "model": {"preset": "swin_moe_micro", "in_chans": 1},
    "train": {"steps": 100, "epochs": None, "batch_size": 10},
}
ARMS: dict[str, Any] = {"dense": {"model": {"moe": None}}, "sparse": {}}


def _config(**values: Any) -> CompareConfig:
    return build(CompareConfig, {"base": BASE, "arms": ARMS, **values})


def test_twins_differ_in_moe_only() -> None:
    runs = resolve_arms(_config(), seed=5)
    dense, sparse = runs["dense"], runs["sparse"]
    assert dense.model.moe is None and sparse.model.moe is not None
    assert dense.seed == sparse.seed == 5
    assert {k for k, v in vars(dense.model).items() if v != getattr(sparse.model, k)} == {"moe"}


def test_flops_budget_counts_the_router() -> None:
    config = _config(match="flops")
    runs = resolve_arms(config, 0)
    lengths = match_lengths(config, runs, steps_per_epoch=7)
    spent = {name: count(runs[name].model).step_flops(10) * (length.steps or 0) for name, length in lengths.items()}
    own = count(runs["sparse"].model).step_flops(10)
    assert own > count(runs["dense"].model).step_flops(10)  # the router costs something
    assert lengths["dense"].steps == 100
    assert spent["dense"] - own < spent["sparse"] <= spent["dense"]


def test_steps_and_seconds() -> None:
    assert {x.steps for x in match_lengths(_config(), resolve_arms(_config(), 0), 7).values()} == {100}
    config = _config(match="seconds", budget_seconds=3.0)
    assert {x.seconds for x in match_lengths(config, resolve_arms(config, 0), 7).values()} == {3.0}


def test_active_parameters_must_match_within_one_percent() -> None:
    config = _config(match="active_params", arms={**ARMS, "wide": {"model": {"moe": None, "mlp_ratio": 6.0}}})
    with pytest.raises(ConfigError, match=r"arm 'wide' has .* active parameters and 'dense'"):
        match_lengths(config, resolve_arms(config, 0), 7)


def test_equal_steps_are_required_and_a_budget_for_one_step() -> None:
    config = _config(arms={**ARMS, "short": {"train": {"steps": 50}}})
    with pytest.raises(ConfigError, match=r"match: steps means equal steps, but the arms plan .*'short': 50"):
        match_lengths(config, resolve_arms(config, 0), 7)
    huge = {"model": {"mlp_ratio": 400.0, "moe": None}}
    config = _config(match="flops", base={**BASE, "train": {"steps": 1, "batch_size": 10}}, arms={**ARMS, "huge": huge})
    with pytest.raises(ConfigError, match="leaves arm 'sparse' without a step"):
        match_lengths(config, resolve_arms(config, 0), 7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arms": {"a": {}, "b": {"train": {"batch_size": 20}}}}, r"differ in 'train.batch_size' \(10 and 20\)"),
        ({"arms": {"a": {}, "b": {"data": {"name": "synthetic"}}}}, "differ in 'data'"),
        ({"arms": {"a": {"seed": 3}}}, "sets 'seed'"),
        ({"arms": {"a": {"modle": {}}}}, "did you mean 'model'"),
    ],
)
def test_what_arms_share_is_set_once(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_arms(_config(**values), 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arms": {}}, "at least one arm"),
        ({"seeds": []}, "seeds is empty"),
        ({"reference": "dnese"}, "not an arm"),
        ({"match": "seconds"}, "needs budget_seconds"),
        ({"match": "step"}, "match"),
    ],
)
def test_bad_comparisons_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(**values)
