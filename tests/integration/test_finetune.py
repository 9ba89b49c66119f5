"""`swinmoe finetune` from end to end: what is loaded, what stays, what is recorded, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from micro import MICRO
from safetensors.torch import load_file
from typer.testing import CliRunner

from swinmoe.checkpoint import checkpoints, latest_checkpoint, load_checkpoint
from swinmoe.cli import app
from swinmoe.config import RunConfig
from swinmoe.config.io import build, merge
from swinmoe.data import build_data
from swinmoe.errors import CheckpointError, ConfigError
from swinmoe.models import build_model
from swinmoe.records import read_records
from swinmoe.train import train
from swinmoe.train.finetune import finetune, plan_finetuning
from swinmoe.train.opened import open_model

LAYER = "layers.1.blocks.1.mlp"
PRETRAIN: dict[str, Any] = {
    "name": "pre",
    "model": {
        **MICRO,
        "drop_path_rate": 0.1,
        "num_classes": 7,
        "moe": {"num_experts": 4, "top_k": 2, "router": {"bias_update_rate": 0.01}, "losses": {"gshard": 0.02}},
    },
    "data": {"name": "synthetic", "channels": 1, "synthetic_classes": 7, "limit": 128},
    "optim": {"base_lr": 0.003},
    "train": {"steps": 3, "epochs": None, "batch_size": 32, "eval_every_epochs": None},
    "checkpoint": {"every_epochs": 0},
    "log": {"every_steps": 3, "peak_flops": 1e11},
}
FINETUNE: dict[str, Any] = {
    "name": "tuned",
    "model": {"num_classes": 10},
    "data": {"name": "digits", "image_size": 32, "limit": 96},
    "optim": {"base_lr": 0.003, "weight_decay": 0.1},
    "train": {"steps": 4, "epochs": None, "batch_size": 32, "eval_every_epochs": None},
    "checkpoint": {"every_epochs": 0},
    "log": {"every_steps": 2, "peak_flops": 1e11},
}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = build(RunConfig, {**PRETRAIN, "output_dir": str(tmp_path_factory.mktemp("sparse"))})
    return train(run, show=False)[0]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    over = {"output_dir": str(tmp_path_factory.mktemp("dense")), "model": {"moe": None, "moe_blocks": []}}
    return train(build(RunConfig, merge(PRETRAIN, merge(over, {"train": {"ema_decay": 0.5}}))), show=False)[0]


def _file(folder: Path, **over: Any) -> Path:
    path = folder / "tune.yaml"
    path.write_text(yaml.safe_dump(merge({**FINETUNE, "output_dir": str(folder)}, over)))
    return path


def _tensors(run: Path, group: str = "model") -> Mapping[str, torch.Tensor]:
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    return load_checkpoint(path).tensors[group]


def _same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> set[str]:
    return {name for name in a if name in b and torch.equal(a[name], b[name])}


@pytest.mark.parametrize("policy", ["none", "router", "experts", "moe", "backbone"])
def test_what_is_frozen_stays_to_the_bit_and_all_else_moves(sparse: Path, tmp_path: Path, policy: str) -> None:
    plan = plan_finetuning(_file(tmp_path, finetune={"freeze": policy}), sparse)
    folder, arm = finetune(plan, show=False)
    before, after = _tensors(sparse), _tensors(folder)
    assert before.keys() == after.keys()
    expected = {
        name
        for name in before
        if (policy in ("router", "moe", "backbone") and f"{LAYER}.router." in name)
        or (policy in ("experts", "moe", "backbone") and f"{LAYER}.experts." in name)
        or (policy == "backbone" and not name.startswith("head."))
    }
    assert _same(before, after) == expected
    assert (policy in ("router", "moe", "backbone")) == (f"{LAYER}.router.expert_bias" in expected)
    held = {p for p in arm.raw.parameters() if not p.requires_grad}
    assert not held & set(arm.optimizer.state) and not held & {
        p for g in arm.optimizer.param_groups for p in g["params"]
    }
    moments = {name.removesuffix("#exp_avg") for name in _tensors(folder, "optimizer") if name.endswith("#exp_avg")}
    assert moments == {name for name in after if name not in expected and not name.endswith("expert_bias")}
    (load,) = (line for line in read_records(folder / "records.jsonl") if line["kind"] == "load")
    assert (
        load["freeze"] == policy and set(load["reinitialised"]) == {"head.weight", "head.bias"} and not load["missing"]
    )
    assert set(load["loaded"]) == {name for name in before if not name.startswith("head.")}
    assert set(load["unused"]) == {"head.weight", "head.bias"} and load["weights"] == "model"
    assert bool(load["frozen"]) == (policy != "none")


@pytest.mark.parametrize(
    ("settings", "weight"),
    [
        ({}, 0.02),
        ({"freeze": "experts"}, 0.02),
        ({"freeze": "router"}, 0.0),
        ({"freeze": "router", "balance": True}, 0.02),
        ({"balance": False}, 0.0),
    ],
)
def test_balance_losses_are_off_where_routers_are_frozen_unless_said(
    sparse: Path, tmp_path: Path, settings: dict[str, Any], weight: float
) -> None:
    plan = plan_finetuning(_file(tmp_path, finetune=settings), sparse)
    assert plan.run.model.moe is not None and plan.run.model.moe.losses.gshard == weight
    usual = settings in ({}, {"freeze": "experts"})
    assert bool(plan.notes) != usual


def test_model_keys_are_laid_on_top_of_the_source(sparse: Path, tmp_path: Path) -> None:
    over = {
        "drop_path_rate": 0.3,
        "window_size": 2,
        "moe": {"experts": {"dropout": 0.2}, "capacity": {"train": {"kind": "fixed"}, "eval": {"kind": "bounded"}}},
    }
    path = _file(tmp_path, model=over, data={"image_size": 24})
    folder, arm = finetune(plan_finetuning(path, sparse, ["model.moe.capacity.eval.factor=2"]), show=False)
    model, moe = arm.run.model, arm.run.model.moe
    assert (model.img_size, model.window_size, model.drop_path_rate, model.num_classes) == ((24, 24), (2, 2), 0.3, 10)
    assert moe is not None and moe.experts.dropout == 0.2 and (moe.num_experts, moe.top_k) == (4, 2)
    assert (moe.capacity.train.kind, moe.capacity.eval.kind, moe.capacity.eval.factor) == ("fixed", "bounded", 2.0)
    assert model.embed_dim == 16  # of the source
    # The position bias is the function that it was, and the checkpoint says so to whoever opens it next.
    source = open_model(sparse).model.config
    assert model.pretrained_window_sizes == ((4, 4), (4, 4)) and source.window_size == (4, 4)
    again = open_model(folder, [f"output_dir={tmp_path}"])
    images = build_data(arm.run.data, seed=0).eval.batch(None, list(range(8)))[0]
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, arm.raw.eval()(images).logits)


def test_a_dense_source_is_upcycled_if_asked(dense: Path, tmp_path: Path) -> None:
    moe = {"moe": {"num_experts": 4, "top_k": 2, "router": {"normalize_gates": True}}, "moe_blocks": [[], [1]]}
    path = _file(tmp_path, model=moe)
    with pytest.raises(ConfigError, match=r"is dense and the model has experts; set finetune\.upcycle"):
        finetune(plan_finetuning(path, dense), show=False)
    plan = plan_finetuning(path, dense, ["finetune.upcycle={}", "optim.base_lr=1e-30", "optim.weight_decay=0"])
    folder, arm = finetune(plan, show=False)
    (load,) = (line for line in read_records(folder / "records.jsonl") if line["kind"] == "load")
    assert load["upcycled"] and load["weights"] == "average" and load["source"].endswith("(moving average)")
    assert any(".router." in name for name in load["reinitialised"]) and not load["missing"]
    # At a rate of nothing the features are still those of the dense model's average.
    images = build_data(arm.run.data, seed=0).eval.batch(None, list(range(8)))[0]
    with torch.no_grad():
        ours = arm.raw.eval()(images).features
    torch.testing.assert_close(ours, open_model(dense)(images).features, atol=1e-5, rtol=1e-5)


def test_moments_that_upcycling_carried_over_are_gone_on_with(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "sparse.yaml"
    moe = {"moe": {"num_experts": 4, "top_k": 2, "router": {"normalize_gates": True}}, "moe_blocks": [[], [1]]}
    config.write_text(yaml.safe_dump(merge(PRETRAIN, {"model": moe})))
    done = CliRunner().invoke(app, ["upcycle", *map(str, (dense, config, tmp_path / "sparse")), "--moments", "carry"])
    assert done.exit_code == 0, (done.output, done.exception)
    carried = load_file(tmp_path / "sparse" / "optimizer.safetensors")
    plan = plan_finetuning(_file(tmp_path), tmp_path / "sparse", ["train.steps=2"])
    folder, _ = finetune(plan, show=False)
    steps = {name: float(value) for name, value in _tensors(folder, "optimizer").items() if name.endswith("#step")}
    already = {name: float(carried[name]) for name in steps}
    assert already[f"{LAYER}.experts.fc1_weight#step"] == 3
    assert steps == {name: 2 + (0 if name.startswith("head.") else already[name]) for name in steps}
    monkeypatch.setattr("swinmoe.train.finetune.fit", lambda *_: None)  # before the first step
    again = plan_finetuning(_file(tmp_path, finetune={"freeze": "router"}), tmp_path / "sparse", ["name=b"])
    _, arm = finetune(again, show=False)
    begun = {name: {k: v.clone() for k, v in arm.optimizer.state[p].items()} for name, p in arm.raw.named_parameters()}
    for name, state in begun.items():
        if name.startswith("head.") or ".router." in name:
            assert not state
        elif ".experts." not in name:
            assert all(torch.equal(value, carried[f"{name}#{key}"]) for key, value in state.items()) and len(state) == 3
    one = begun[f"{LAYER}.experts.fc2_weight"]["exp_avg_sq"][3]
    assert torch.equal(one, carried[f"{LAYER}.experts.3.fc2.weight#exp_avg_sq"]) and one.any()


def test_weights_and_average_can_be_chosen(dense: Path, tmp_path: Path) -> None:
    for weights, group in (("model", "model"), ("average", "average"), ("auto", "average")):
        plan = plan_finetuning(_file(tmp_path), dense, [f"finetune.weights={weights}"])
        stored = _tensors(dense, group)
        assert torch.equal(plan.source.found.named["norm.weight"], stored["norm.weight"])
        assert plan.source.weights == group
    assert not torch.equal(_tensors(dense)["norm.weight"], _tensors(dense, "average")["norm.weight"])


def test_a_kept_head_by_class_map(sparse: Path, tmp_path: Path) -> None:
    mapping = tmp_path / "map.txt"
    mapping.write_text("6\n0\n3\n")
    over = {"model": {"num_classes": 3}, "data": {"name": "synthetic", "channels": 1, "synthetic_classes": 3}}
    settings = {"head": "keep", "class_map": str(mapping)}
    path = _file(tmp_path, **over, finetune=settings, optim={"base_lr": 1e-30, "weight_decay": 0.0})
    folder, _ = finetune(plan_finetuning(path, sparse), show=False)
    assert torch.equal(_tensors(folder)["head.weight"], _tensors(sparse)["head.weight"][[6, 0, 3]])


@pytest.mark.parametrize("said", [True, False])
def test_a_resumed_fine_tuning_equals_an_uninterrupted_one(
    sparse: Path, tmp_path: Path, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it needs its source no more, whether --from is said again or not."""
    save = {"checkpoint": {"every_steps": 2, "keep_last": 9}, "finetune": {"freeze": "experts"}}
    path = _file(tmp_path, optim={"layer_decay": 0.7}, **save)
    whole, _ = finetune(plan_finetuning(path, sparse), show=False)
    halved, _ = finetune(plan_finetuning(path, sparse, ["name=halved"]), show=False)
    last = checkpoints(halved / "checkpoints")[-1]
    for file in last.iterdir():
        file.unlink()
    monkeypatch.setattr("swinmoe.train.finetune.open_pretrained", None)  # the source is gone
    plan = plan_finetuning(path, sparse if said else None, ["name=halved", "resume=auto"])
    assert plan.source is None and plan.settings.source == str(sparse)
    resumed, _ = finetune(plan, show=False)
    for group in ("model", "optimizer"):
        one, two = _tensors(whole, group), _tensors(resumed, group)
        assert one.keys() == two.keys() and _same(one, two) == set(one)
    assert checkpoints(resumed / "checkpoints")[-1].name == last.name
    (load,) = (line for line in read_records(resumed / "records.jsonl") if line["kind"] == "load")
    assert load["source"] == str(sparse)
    other = plan_finetuning(path, sparse, ["name=halved", "resume=auto", "model.drop_path_rate=0.4"])
    with pytest.raises(CheckpointError, match=r"model\.drop_path_rate \(saved 0\.1, now 0\.4\)"):
        finetune(other, show=False)


def test_weights_of_nobody_we_know_need_no_more_than_a_state_dict(tmp_path: Path) -> None:
    model = build_model(
        build(RunConfig, merge(PRETRAIN, {"model": {"style": "v1", "moe": None, "moe_blocks": []}})).model
    )
    torch.save({"model": model.state_dict()}, tmp_path / "theirs.pth")
    plan = plan_finetuning(_file(tmp_path, model={"window_size": 4}), tmp_path / "theirs.pth")
    assert plan.run.model.depths == model.config.depths and plan.run.model.moe is None
    folder, arm = finetune(plan, show=False)
    assert arm.step == 4 and (folder / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["finetune.freez=moe"], "unknown config key 'finetune.freez'; did you mean 'freeze'"),
        (["finetune.freeze=most"], "finetune.freeze"),
        (["finetune.class_map=x"], "finetune.head=new has none of them"),
        (["finetune.upcycle.drop=1.5"], r"finetune.upcycle.drop=1.5 must be in \[0, 1\)"),
        (["model.embed_dim=32"], "does not fit"),
        (["model.in_chans=3"], "digits images have 1 channels"),
        (["model.moe=null", "model.moe_blocks=[]"], "experts"),
    ],
)
def test_mistakes_are_named(sparse: Path, tmp_path: Path, over: list[str], message: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message):
        finetune(plan_finetuning(_file(tmp_path), sparse, over), show=False)
    assert not (tmp_path / "tuned" / "records.jsonl").exists()


def test_train_does_not_pretend_to_fine_tune(tmp_path: Path) -> None:
    run = build(RunConfig, {**PRETRAIN, "output_dir": str(tmp_path), "finetune": {"freeze": "moe"}})
    with pytest.raises(ConfigError, match="only swinmoe finetune obeys"):
        train(run, show=False)
    assert not (tmp_path / "pre" / "records.jsonl").exists()


def test_a_source_and_a_number_of_classes_must_be_said(sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --from CKPT"):
        plan_finetuning(_file(tmp_path), None)
    with pytest.raises(CheckpointError, match="does not exist"):
        plan_finetuning(_file(tmp_path), tmp_path / "nowhere")
    path = _file(tmp_path, model={"num_classes": None})
    tree = yaml.safe_load(path.read_text())
    del tree["model"]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"model\.num_classes is not said"):
        plan_finetuning(path, sparse)
