"""Capacity of single layers, and the adaptive policy, as configuration."""

from __future__ import annotations

from typing import Any

import pytest

from swinmoe.config import RunConfig
from swinmoe.config.io import build, dump, merge, read_yaml, to_tree
from swinmoe.config.shrink import shrink
from swinmoe.errors import ConfigError
from swinmoe.models import build_model
from swinmoe.models.counts import count
from swinmoe.train.arm import check_capacity

SECOND = "layers.1.blocks.1.mlp"


def run_with(capacity: Any, **model: Any) -> RunConfig:
    sizes = {"preset": "swin_moe_micro", "depths": [2, 2], "moe_blocks": [[1], [1]], "num_heads": [1, 2]}
    return build(RunConfig, {"model": {**sizes, "moe": {"capacity": capacity}, **model}})


def test_a_layer_has_its_own_policy_and_the_others_the_models():
    tight = {"kind": "bounded", "factor": 0.7}
    run = run_with({"eval": {"kind": "fixed", "factor": 2.0}, "layers": {SECOND: {"eval": tight}}})
    assert run.model.moe_layer_names() == ["layers.0.blocks.1.mlp", SECOND]
    first, second = build_model(run.model, device="meta").moe_layers().values()
    assert (first.cfg.capacity.eval.kind, first.cfg.capacity.eval.factor) == ("fixed", 2.0)
    assert (second.cfg.capacity.eval.kind, second.cfg.capacity.eval.factor) == ("bounded", 0.7)
    assert first.cfg.capacity.train == second.cfg.capacity.train == run.model.moe.capacity.train
    assert list(build_model(run.model, device="meta").moe_layers()) == run.model.moe_layer_names()


def test_it_comes_back_from_yaml(tmp_path):
    run = run_with({"train": {"kind": "adaptive"}, "layers": {SECOND: {"train": {"kind": "dropless"}}}})
    (tmp_path / "config.yaml").write_text(dump(run))
    again = build(RunConfig, read_yaml(tmp_path / "config.yaml"))
    assert again == run and again.model.moe.capacity.layers[SECOND].train.kind == "dropless"
    assert again.model.moe.capacity.layers[SECOND].eval is None
    without = build(RunConfig, merge(to_tree(run), {"model": {"moe": {"capacity": {"layers": None}}}}))
    assert without.model.moe.capacity.of(SECOND).train.kind == "adaptive"


def test_an_unknown_layer_is_an_error_that_names_the_layers():
    with pytest.raises(ConfigError, match=r"'layers.1.blocks.0.mlp'.*its layers are layers.0.blocks.1.mlp, layers.1"):
        run_with({"layers": {"layers.1.blocks.0.mlp": {}}})


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ({"evaluation": {}}, r"layers.layers.1.blocks.1.mlp.evaluation'; allowed: train, eval"),
        ({"eval": {"kid": "fixed"}}, r"eval.kid'.*'kind'"),
        ({"eval": {"kind": "adaptive"}}, "for training"),
        ({"eval": {"kind": "fixed", "factor": -1}}, "must be positive"),
    ],
)
def test_mistakes_inside_a_layer_are_named(layer, said):
    with pytest.raises(ConfigError, match=said):
        run_with({"layers": {SECOND: layer}})


def test_evaluation_does_not_adapt():
    with pytest.raises(ConfigError, match="for training"):
        run_with({"eval": {"kind": "adaptive"}})


def test_a_ceiling_below_the_floor_is_refused():
    with pytest.raises(ConfigError, match=r"ceiling=0.5 is below its floor=1.0"):
        run_with({"train": {"kind": "adaptive", "adapt": {"floor": 1.0, "ceiling": 0.5}}})


def test_the_papers_flops_count_each_layer_by_its_own_factor():
    fixed = {"kind": "fixed", "factor": 1.0}
    plain = count(run_with({"eval": fixed}).model).table_flops
    wide = {"kind": "fixed", "factor": 2.0}
    first = count(run_with({"eval": fixed, "layers": {"layers.0.blocks.1.mlp": {"eval": wide}}}).model).table_flops
    both = count(run_with({"eval": wide}).model).table_flops
    second = count(run_with({"eval": fixed, "layers": {SECOND: {"eval": wide}}}).model).table_flops
    assert plain < first < both and first - plain + second - plain == pytest.approx(both - plain)


def test_a_layer_without_slots_is_found_before_training():
    none = {"kind": "fixed", "factor": 0.001, "min_slots": 0}
    with pytest.raises(ConfigError, match="gives every expert 0 slots"):
        check_capacity(run_with({"layers": {SECOND: {"train": none}}}), world=1)


def test_a_shrunk_run_has_no_policies_of_layers_it_lost():
    run = run_with({"layers": {SECOND: {"eval": {"kind": "dropless"}}}}, depths=[2, 4], moe_blocks=[[], [1, 3]])
    assert shrink(run).model.moe.capacity.layers is None
