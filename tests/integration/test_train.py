"""Training through the Python entry points: what a config promises, and what happens when it goes wrong."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import MICRO

from swinmoe.checkpoint import checkpoints, latest_checkpoint, load_checkpoint, open_checkpoint
from swinmoe.compare import compare
from swinmoe.config import CompareConfig, RunConfig
from swinmoe.config.io import build, merge
from swinmoe.errors import BackendUnavailableError, CheckpointError, ConfigError, NonFiniteLossError
from swinmoe.models import build_model
from swinmoe.moe import expert_mlp
from swinmoe.native import build as native_build
from swinmoe.records import read_records
from swinmoe.train import train
from swinmoe.train.loss_scale import LossScale

BASE: dict[str, Any] = {
    "name": "run",
    "model": {
        **MICRO,
        "drop_path_rate": 0.1,
        "moe": {"num_experts": 4},
    },
    "data": {"name": "digits", "limit": 256},
    "optim": {"base_lr": 0.003},
    "train": {"steps": 6, "epochs": None, "batch_size": 32, "eval_every_epochs": None},
    "checkpoint": {"every_epochs": 0},
    "log": {"every_steps": 2, "peak_flops": 1e11},
}


def _run(folder: Path, **over: Any) -> RunConfig:
    return build(RunConfig, merge({**BASE, "output_dir": str(folder)}, over))


def _lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_records(folder / "records.jsonl") if line["kind"] == kind]


def _model(folder: Path) -> Mapping[str, torch.Tensor]:
    path = latest_checkpoint(folder / "checkpoints")
    assert path is not None
    return load_checkpoint(path).tensors["model"]


def test_records_say_what_happened(tmp_path: Path) -> None:
    folder, arm = train(_run(tmp_path, train={"steps": 16}), show=False)
    steps = _lines(folder, "step")
    assert [s["step"] for s in steps] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert steps[-1]["loss"] < steps[0]["loss"] < math.log(10) + 0.2
    last = steps[-1]
    assert last["images"] == 16 * 32 and last["flops"] == 16 * arm.counts.step_flops(32)
    assert last["epoch"] == 2.0 and 0 < last["data_wait"] < 1 and last["mfu"] > 0 and last["peak_memory_bytes"] > 1e7
    assert last["grad_norm"] > 0 and last["seconds"] > 0
    routing = last["routing"]["layers.1.blocks.1.mlp"]
    tokens = 2 * 32 * 4 * 4  # two steps since the last line, 4 x 4 map
    assert sum(routing["routed"]) == sum(routing["kept"]) == tokens and routing["drop_fraction"] == 0
    assert 0 < routing["token_entropy"] <= 1 and 0 < routing["load_entropy"] <= 1 and routing["dead_experts"] == 0
    assert routing["losses"]["gshard"] >= 0.99
    (evaluation,) = _lines(folder, "eval")
    assert evaluation["count"] == 256 and evaluation["split"] == "test"
    (final,) = _lines(folder, "final")
    assert final["accuracy"] == evaluation["accuracy"] and final["loss"] == pytest.approx(last["loss"])


def test_accumulation_equals_the_whole_batch(tmp_path: Path) -> None:
    """Dropless, without noise, float64, with the z-loss, which is a mean over tokens: the same numbers."""
    losses = {"gshard": 0.0, "z": 0.1}
    quiet = {"model": {"drop_path_rate": 0.0, "moe": {"losses": losses}}, "train": {"precision": "fp64"}}
    whole, _ = train(_run(tmp_path, name="whole", **quiet), show=False)
    split = merge(quiet, {"train": {"accumulation": 4}})
    parts, _ = train(_run(tmp_path, name="parts", **split), show=False)
    ours, theirs = _model(parts), _model(whole)
    assert max(float((ours[k] - theirs[k]).abs().max()) for k in ours) < 1e-12


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_checkpointed_activations_change_nothing(tmp_path: Path, precision: str) -> None:
    noisy = {
        "model": {"moe": {"router": {"noise": 1.0}, "experts": {"dropout": 0.1}}},
        "train": {"precision": precision},
    }
    plain, _ = train(_run(tmp_path, name="plain", **noisy), show=False)
    again, _ = train(_run(tmp_path, name="again", **merge(noisy, {"model": {"grad_checkpointing": True}})), show=False)
    ours, theirs = _model(again), _model(plain)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    counted, expected = ([s["routing"] for s in _lines(run, "step")] for run in (again, plain))
    assert counted == expected  # once, not twice


def test_average_is_evaluated_and_saved(tmp_path: Path) -> None:
    folder, arm = train(_run(tmp_path, train={"ema_decay": 0.5}), show=False)
    assert _lines(folder, "eval")[0]["weights"] == "ema"
    assert arm.evaluated() is not arm.raw
    path = latest_checkpoint(folder / "checkpoints")
    assert path is not None
    average = load_checkpoint(path).tensors["average"]
    assert not torch.equal(average["head.weight"], _model(folder)["head.weight"])


def test_tensorboard_files_appear_when_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    folder, _ = train(_run(tmp_path, log={"tensorboard": True}), show=False)
    assert list((folder / "tensorboard").rglob("events.out.tfevents.*"))


def test_non_finite_loss_stops_with_step_and_layer_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    wild = _run(tmp_path, optim={"base_lr": 1e30, "clip_grad_norm": None}, checkpoint={"every_steps": 1})
    with pytest.raises(
        NonFiniteLossError, match=r"not finite at step \d+, first in (layer|parameter|the input of layer) '"
    ):
        train(wild, show=False)
    path = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert path is not None and load_checkpoint(path).step >= 1


def test_a_changed_config_is_not_resumed(tmp_path: Path) -> None:
    folder, arm = train(_run(tmp_path), show=False)
    stored = open_checkpoint(folder / "checkpoints" / "step-00000006")
    with pytest.raises(CheckpointError, match=r"was to train for .*9.* and now for .*6"):
        arm.load(stored, "", arm.values() | {"length": [9, None]})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"made by another config: optim\.base_lr \(saved 0\.003, now 0\.5\)"):
        train(_run(tmp_path, resume="auto", optim={"base_lr": 0.5}), show=False)
    with pytest.raises(CheckpointError, match=r"train\.steps \(saved 6, now 9\)"):
        train(_run(tmp_path, resume="auto", train={"steps": 9}), show=False)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    train(_run(tmp_path, resume="auto", log={"every_steps": 1}), show=False)  # what changes no number may change


def test_a_capacity_without_slots_is_refused_at_start(tmp_path: Path) -> None:
    policy = {"train": {"kind": "fixed", "factor": 0.001, "min_slots": 0}}
    with pytest.raises(ConfigError, match="0 slots"):
        train(_run(tmp_path, model={"moe": {"capacity": policy}}), show=False)
    assert list(tmp_path.iterdir()) == []


def test_going_back_to_an_older_checkpoint_gives_up_the_newer_ones(tmp_path: Path) -> None:
    every = {"checkpoint": {"every_steps": 2, "every_epochs": 0, "keep_last": 9}}
    folder, _ = train(_run(tmp_path, **every), show=False)
    whole = _model(folder)
    oldest = folder / "checkpoints" / "step-00000002"
    train(_run(tmp_path, resume=str(oldest), **merge(every, {"checkpoint": {"keep_last": 2}})), show=False)
    assert [p.name for p in checkpoints(folder / "checkpoints")] == ["step-00000004", "step-00000006"]
    again = _model(folder)
    assert all(torch.equal(again[k], whole[k]) for k in whole)
    assert [s["step"] for s in _lines(folder, "step")] == [2, 4, 6]


def test_a_scaled_loss_trains_alike_and_an_overflow_skips_the_step(tmp_path: Path, monkeypatch: Any) -> None:
    """float16's machinery on the CPU: a scale of 2^16 changes no bit of float64 training; an overflow halves it."""
    config = {"train": {"precision": "fp64"}, "optim": {"clip_grad_norm": None}}
    plain, _ = train(_run(tmp_path, name="plain", **config), show=False)
    monkeypatch.setattr("swinmoe.train.arm.make_loss_scale", lambda precision: LossScale(2.0**16, dynamic=True))
    scaled, arm = train(_run(tmp_path, name="scaled", **config), show=False)
    ours, theirs = _model(scaled), _model(plain)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours) and arm.scale.good_steps == 6
    monkeypatch.setattr("swinmoe.train.arm.make_loss_scale", lambda precision: LossScale(1e308, dynamic=True))
    _, arm = train(_run(tmp_path, name="over", **config), show=False)
    assert arm.scale.value == 1e308 / 2**6
    start = build_model(arm.run.model, seed=0, dtype=torch.float64).state_dict()
    assert all(torch.equal(start[k], v) for k, v in arm.raw.state_dict().items())  # all six steps were skipped


def _twins(folder: Path, **over: Any) -> CompareConfig:
    base = {k: v for k, v in BASE.items() if k != "name"}
    arms = {"dense": {"model": {"moe": None}}, "sparse": {}}
    return build(CompareConfig, {"output_dir": str(folder), "base": base, "arms": arms, "sample_images": 2, **over})


def test_arms_do_not_touch_each_other(tmp_path: Path) -> None:
    """In lockstep or one after the other, with a third arm or without: each arm's numbers are the same bits."""
    lock = compare(_twins(tmp_path, name="lock"), show=False)
    after = compare(_twins(tmp_path, name="after", schedule="sequential"), show=False)
    assert lock is not None and after is not None
    clock = {"seconds", "images_per_second", "data_wait", "mfu", "peak_memory_bytes"}

    def numbers(name: str, arm: str) -> list[dict[str, Any]]:
        lines = [x for kind in ("step", "eval", "final") for x in _lines(tmp_path / name, kind) if x["arm"] == arm]
        return [{k: v for k, v in line.items() if k not in clock} for line in lines]

    for arm in ("dense", "sparse"):
        assert numbers("lock", arm) == numbers("after", arm) and len(numbers("lock", arm)) == 5
    pictures = _lines(tmp_path / "lock", "samples")
    assert {p["arm"] for p in pictures} == {"sparse"} and len(pictures[0]["images"]) == 2
    grid = pictures[0]["images"][0]["experts"]
    assert len(grid) == len(grid[0]) == 4 and all(0 <= e < 4 for row in grid for e in row)
    (table,) = _lines(tmp_path / "lock", "class_expert")
    assert sum(map(sum, table["table"])) == 256 * 16
    assert lock.html.is_file() and "sparse" in lock.headline


def test_arms_matched_on_seconds_use_their_seconds(tmp_path: Path) -> None:
    compare(_twins(tmp_path, name="timed", match="seconds", budget_seconds=0.5), show=False)
    for final in _lines(tmp_path / "timed", "final"):
        steps = [s for s in _lines(tmp_path / "timed", "step") if s["arm"] == final["arm"]]
        assert (
            steps[-1]["seconds"] >= 0.5 and final["step"] == steps[-1]["step"] and final["reason"] == "used its seconds"
        )


def test_finished_seeds_are_not_trained_again(tmp_path: Path) -> None:
    compare(_twins(tmp_path, name="seeds", seeds=[1]), show=False)
    before = (tmp_path / "seeds" / "records.jsonl").read_text()
    with pytest.raises(ConfigError, match="already holds a run"):
        compare(_twins(tmp_path, name="seeds", seeds=[1]), show=False)
    compare(_twins(tmp_path, name="seeds", seeds=[1, 2], resume="auto"), show=False)
    after = (tmp_path / "seeds" / "records.jsonl").read_text()
    assert after.startswith(before)
    base = merge({k: v for k, v in BASE.items() if k != "name"}, {"optim": {"base_lr": 0.5}})
    with pytest.raises(CheckpointError, match=r"seed 1 of arm 'dense' .* was made by another config: optim\.base_lr"):
        compare(_twins(tmp_path, name="seeds", seeds=[1, 2, 3], resume="auto", base=base), show=False)
    with pytest.raises(CheckpointError, match="was begun with match: steps, not flops"):
        compare(_twins(tmp_path, name="seeds", seeds=[1, 2, 3], resume="auto", match="flops"), show=False)
    with pytest.raises(ConfigError, match="resume=auto, which finds each one's own"):
        compare(_twins(tmp_path, name="seeds", seeds=[1, 2], resume="somewhere"), show=False)
    assert (tmp_path / "seeds" / "records.jsonl").read_text() == after
    assert [x["seed"] for x in _lines(tmp_path / "seeds", "final")] == [1, 1, 2, 2]


# Dynamo looks at `.grad` of every input, also of a map that comes from the block before.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which inductor needs on a CPU")
def test_compiled_blocks_train_as_others_do(tmp_path: Path) -> None:
    """By inductor, and saved under the names that they have without it."""
    # One dense and one sparse block: a graph and a half.
    model = {"depths": [1, 1], "moe_blocks": [[], [0]], "drop_path_rate": 0.0}
    common = {"model": model, "train": {"precision": "fp64", "steps": 2, "ema_decay": 0.9}}
    plain, _ = train(_run(tmp_path, name="plain", **common), show=False)
    changed = merge(common, {"train": {"compile": True}})
    folder, _ = train(_run(tmp_path, name="compiled", **changed), show=False)
    (line,) = _lines(folder, "arm")
    assert line["compiled"]["whole"] == ["layers.0.blocks.0"]
    assert list(line["compiled"]["attention_only"]) == ["layers.1.blocks.0"]
    for name, value in _model(plain).items():
        torch.testing.assert_close(_model(folder)[name], value, rtol=1e-9, atol=1e-11)
    accuracy = [_lines(f, "final")[0]["accuracy"] for f in (plain, folder)]
    assert accuracy[0] == accuracy[1]


@pytest.mark.usefixtures("native_kernels")
def test_native_kernels_train_as_torch_does(tmp_path: Path) -> None:
    """To the digits that single precision has, and saved, resumed and averaged like any other model."""
    common = {"train": {"steps": 3, "ema_decay": 0.9}, "checkpoint": {"every_steps": 2}}
    plain, _ = train(_run(tmp_path, name="plain", **common), show=False)
    changed = merge(common, {"train": {"native_kernels": "all"}})
    folder, _ = train(_run(tmp_path, name="native", **changed), show=False)
    assert any(not torch.equal(_model(folder)[name], value) for name, value in _model(plain).items())
    for name, value in _model(plain).items():
        torch.testing.assert_close(_model(folder)[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("expert_kernel")
def test_experts_take_their_kernel_unless_told_not_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    real = expert_mlp.kernel_mlp
    monkeypatch.setattr(expert_mlp, "kernel_mlp", lambda *given: taken.append(1) or real(*given))
    common = {"model": {"moe": {"num_experts": 2}, "moe_blocks": [[], [0]]}, "train": {"steps": 2}}
    folders = {}
    for kernels in ("none", "experts", "all"):
        before = len(taken)
        changed = merge(common, {"train": {"native_kernels": kernels, "ema_decay": 0.9}})  # the average evaluates
        folders[kernels], _ = train(_run(tmp_path, name=kernels, **changed), show=False)
        assert (len(taken) > before) is (kernels != "none")
    plain = _model(folders["none"])
    for kernels in ("experts", "all"):
        for name, value in _model(folders[kernels]).items():
            torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize(("precision", "vain"), [("fp32", False), ("fp64", True)])
def test_native_kernels_are_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str, vain: bool
) -> None:
    train(_run(tmp_path, train={"steps": 1, "native_kernels": "all", "precision": precision}))
    said = " ".join("".join(capsys.readouterr()).split())
    assert "takes our kernels in C++ for attention and all MLPs" in said
    assert ("in vain: they are fp32 alone, and train.precision=fp64" in said) is vain


def test_native_kernels_without_a_compiler_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    native_build.kernels.cache_clear()
    with pytest.raises(BackendUnavailableError, match=r"CXX names 'no-such-compiler', which is not installed"):
        train(_run(tmp_path, train={"native_kernels": "all"}), show=False)


def test_compiling_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendUnavailableError, match=r"CXX names 'no-such-compiler', .*train\.compile=false"):
        train(_run(tmp_path, train={"compile": True}), show=False)
