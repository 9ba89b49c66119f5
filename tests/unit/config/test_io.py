"""YAML and overrides to configs and back; what is wrong is said with what would be right."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swinmoe.config import CompareConfig, ModelConfig, RunConfig
from swinmoe.config.io import build, dump, load, merge, parse_overrides, read_yaml, run_config, to_tree, with_overrides
from swinmoe.config.presets import PRESETS
from swinmoe.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_written_reads_back_as_the_same(name):
    run = build(RunConfig, {"model": {"preset": name}})
    assert build(RunConfig, yaml.safe_load(dump(run))) == run


def test_a_resolved_config_no_longer_needs_its_preset():
    run = build(RunConfig, {"model": {"preset": "swin_micro", "embed_dim": 64, "num_heads": [2, 4]}})
    tree = to_tree(run)
    tree["model"]["preset"] = "custom"
    assert build(RunConfig, tree).model.embed_dim == 64


def test_numbers_that_yaml_takes_for_words(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optim: {base_lr: 1e-4, weight_decay: 5e-2}\nmodel: {preset: swin_micro}\n")
    run = run_config(path, ["optim.eps=1e-6"])
    assert (run.optim.base_lr, run.optim.weight_decay, run.optim.eps) == (1e-4, 5e-2, 1e-6)


def test_one_number_stands_for_a_pair():
    cfg = build(ModelConfig, {"img_size": 64, "window_size": [4, 8], "patch_size": 2})
    assert (cfg.img_size, cfg.window_size, cfg.patch_size) == ((64, 64), (4, 8), (2, 2))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"optm": {}}, "unknown config key 'optm'; did you mean 'optim'"),
        (
            {"model": {"moe": {"num_expert": 4}}},
            "unknown config key 'model.moe.num_expert'; did you mean 'num_experts'",
        ),
        ({"model": {"moe": {"router": {"zzz": 4}}}}, "unknown config key 'model.moe.router.zzz'; allowed: .*noise"),
        ({"optim": {"base_lr": "fast"}}, "config key 'optim.base_lr' was given 'fast'"),
        ({"train": {"epochs": None}}, "train.epochs and train.steps are both null"),
        ({"train": {"batch_size": 10, "accumulation": 4}}, "cannot be split"),
        ({"parallel": {"ep_size": 0}}, "parallel.ep_size=0"),
        (
            {"model": {"preset": "swin_moe_micro"}, "parallel": {"ep_size": 3}},
            r"ep_size=3 does not divide .*\[1, 2, 4, 8\]",
        ),
        ({"parallel": {"ep_size": 4, "weight_group": 3}}, r"weight_group=3 does not divide .*\[1, 2, 4\]"),
        ({"parallel": {"chunks": 2}}, "chunks=2 has no meaning where no token travels"),
        (
            {"parallel": {"ep_size": 2, "weight_group": 2, "exchange": "2dh"}},
            "exchange=2dh has no meaning where no token travels",
        ),
        ({"parallel": {"ep_size": 2, "payload": "bf16", "weight_group": 2}}, "payload=bf16 has no meaning"),
        ({"parallel": {"ep_size": 4, "local_size": 2}}, "local_size=2 is for exchange=2dh"),
        (
            {"parallel": {"ep_size": 8, "weight_group": 2, "exchange": "2dh", "local_size": 3}},
            r"local_size=3 does not cut ep_size=8 .*\[2, 4, 8\]",
        ),
        (
            {
                "model": {"preset": "swin_moe_micro", "moe": {"num_experts": 2}},
                "parallel": {"ep_size": 12, "weight_group": 4},
            },
            r"weight_group=4 gathers neither whole experts .*\[1, 2, 3, 6, 12\]",
        ),
    ],
)
def test_mistakes_are_explained(tree, message):
    with pytest.raises(ConfigError, match=message):
        build(RunConfig, tree)


def test_every_mistake_of_one_kind_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        build(RunConfig, {"optim": {"base_lr": "fast", "eps": "small"}})
    assert "optim.base_lr" in str(caught.value)
    assert "optim.eps" in str(caught.value)


def test_overrides_nest_and_later_ones_win():
    tree = parse_overrides(["a.b=1", "a.c=[1, 2]", "a.b=2", "d=null", "e=a: b"])
    assert tree == {"a": {"b": 2, "c": [1, 2]}, "d": None, "e": {"a": "b"}}


@pytest.mark.parametrize("item", ["novalue", "=1", "a=[1", "a=2024-13-45"])
def test_malformed_overrides_are_refused(item):
    with pytest.raises(ConfigError, match="override"):
        parse_overrides([item])


def test_null_removes_what_a_mapping_would_extend():
    assert merge({"moe": {"k": 1, "e": 2}}, {"moe": {"k": 3}}) == {"moe": {"k": 3, "e": 2}}
    assert merge({"moe": {"k": 1}}, {"moe": None}) == {"moe": None}
    twin = build(RunConfig, {"model": {"preset": "swin_moe_micro", "moe": None}})
    assert twin.model.moe is None


TREES = st.recursive(
    st.integers(0, 3) | st.none(),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
MAPPINGS = st.dictionaries(st.sampled_from("abc"), TREES, max_size=3)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # both measure the machine, not the code
@given(MAPPINGS, MAPPINGS)
def test_merge_changes_neither_side_and_is_idempotent(base, over):
    before = (repr(base), repr(over))
    once = merge(base, over)
    assert (repr(base), repr(over)) == before
    assert merge(once, over) == once
    assert merge({}, base) == base == merge(base, {})


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "digits.yaml").write_text("")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "broken.yaml").write_text("a: [1")
    assert read_yaml(tmp_path / "digits.yaml") == {}
    with pytest.raises(ConfigError, match=r"does not exist; did you mean 'digits\.yaml'"):
        read_yaml(tmp_path / "digit.yaml")
    with pytest.raises(ConfigError, match="a mapping of keys is needed"):
        read_yaml(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(tmp_path / "broken.yaml")
    (tmp_path / "date.yaml").write_text("a: 2024-13-45")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(tmp_path / "date.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: café".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        read_yaml(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match=r"is a folder; give a YAML file in it: .*'broken\.yaml'"):
        read_yaml(tmp_path)


@pytest.mark.parametrize("preset", [123, None, ["swin_micro"]])
def test_a_preset_is_a_name(preset):
    for kind, tree in ((RunConfig, {"model": {"preset": preset}}), (ModelConfig, {"preset": preset})):
        with pytest.raises(ConfigError, match=r"model\.preset=.* is not a name"):
            build(kind, tree)


def test_resume_is_a_word_or_an_existing_checkpoint(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {preset: swin_micro}\n")
    for good in ("auto", "never", str(tmp_path)):
        assert load(RunConfig, path, [f"resume={good}"]).resume == good
    with pytest.raises(ConfigError, match=r"resume='atuo' .*; did you mean 'auto'"):
        load(RunConfig, path, ["resume=atuo"])
    with pytest.raises(ConfigError, match=r"nor a checkpoint's folder$"):
        load(RunConfig, path, [f"resume={tmp_path / 'step-9'}"])


def test_overrides_lie_on_top_of_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {preset: swin_moe_micro}\ntrain: {epochs: 3}\n")
    run = load(RunConfig, path, ["model.moe.top_k=2", "train.batch_size=8"])
    assert (run.model.moe.top_k, run.model.moe.num_experts, run.train.epochs, run.train.batch_size) == (2, 8, 3, 8)
    assert with_overrides(run, {"model": {"moe": None}}).model.moe is None


def test_configs_are_frozen():
    with pytest.raises(FrozenInstanceError):
        build(ModelConfig, {}).embed_dim = 1


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "at least one arm"),
        ({"arms": {"a": {}}, "seeds": []}, "seeds is empty"),
        ({"arms": {"a": {}}, "reference": "b"}, "reference='b' is not an arm"),
        ({"arms": {"a": {}}, "match": "seconds"}, "needs budget_seconds"),
    ],
)
def test_impossible_comparisons(tree, message):
    with pytest.raises(ConfigError, match=message):
        build(CompareConfig, tree)


@pytest.mark.parametrize(("old", "now"), [(False, "none"), (True, "all")])
def test_kernels_of_configs_that_said_yes_or_no(old: bool, now: str) -> None:
    """As in checkpoints that were written when these were the choices."""
    assert build(RunConfig, {"train": {"native_kernels": old}}).train.native_kernels == now
