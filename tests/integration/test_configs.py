"""Every shipped YAML keeps what its header promises: it resolves, builds, and the debug ones are trained here."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from swinmoe.cli import main
from swinmoe.commands.profile import runs_of as runs_of_sweep
from swinmoe.compare import compare, resolve_arms
from swinmoe.config import CompareConfig, RunConfig, resolve_style
from swinmoe.config.io import build, dump, load, merge, read_yaml
from swinmoe.config.profile import LayerSweepConfig, ModelSweepConfig, listed
from swinmoe.config.profile_exchange import ExchangeSweepConfig, listed_exchange
from swinmoe.config.shrink import shrink, shrink_comparison
from swinmoe.models.build import build_model
from swinmoe.models.counts import count
from swinmoe.records import read_records
from swinmoe.train import train
from swinmoe.train.finetune import finetune, plan_finetuning

ROOT = Path(__file__).parents[2]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
COMPARISONS = [file for file in FILES if file.startswith("configs/compare/")]
DEBUG = [file for file in FILES if file.startswith("configs/debug/")]
FINETUNE = [file for file in FILES if file.startswith("configs/finetune/")]
PROFILES = [file for file in FILES if file.startswith("configs/profile/")]
RUNS = [file for file in FILES if file not in PROFILES]


LESS_WORK = ("log.every_steps=4", "log.peak_flops=1e11", "train.eval_every_epochs=null")
"""What a test can leave out of a debug run: evaluation on the way, and measuring the machine."""


def header(file: str) -> str:
    """The comment that a file begins with."""
    lines = []
    for line in (ROOT / file).read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return "\n".join(lines)


def runs_of(file: str) -> dict[str, RunConfig]:
    """The run, or the arms of the comparison, that a file describes."""
    if file.startswith("configs/compare/"):
        config = load(CompareConfig, ROOT / file)
        return resolve_arms(config, config.seeds[0])
    if file not in FINETUNE:
        return {"": load(RunConfig, ROOT / file)}
    before = read_back(load(RunConfig, pretraining(file)[0]))["model"]
    return {"": load(RunConfig, ROOT / file, prepare=lambda tree: {**tree, "model": merge(before, tree["model"])})}


def pretraining(file: str) -> tuple[Path, bool]:
    """The config that a fine-tuning's header goes on from, and whether it is its dense twin."""
    found = re.search(r"--from runs/pretrain_(\w+)", header(file))
    assert found is not None
    return ROOT / f"configs/pretrain/{found[1].removesuffix('_dense')}.yaml", found[1].endswith("_dense")


def read_back(run: RunConfig) -> dict[str, Any]:
    """What `config.yaml` in the run's folder would hold, read again."""
    tree: dict[str, Any] = yaml.safe_load(dump(run))
    return tree


def without_experts(run: RunConfig) -> RunConfig:
    tree = read_back(run)
    tree["model"]["moe"] = None
    return build(RunConfig, tree)


def test_there_are_configs():
    assert len(DEBUG) >= 15
    assert {file.split("/")[1] for file in FILES} >= {"debug", "train", "compare"}


@pytest.mark.parametrize("file", FILES)
def test_its_header_says_command_cost_and_expected_result(file):
    text = header(file)
    command = {"compare": "compare", "finetune": "finetune"}.get(file.split("/")[1], "train")
    if file in PROFILES:
        command = f"profile {read_yaml(ROOT / file)['what']}"
    assert re.search(rf"^Command: .*\b{command} {file}\b", text, re.MULTILINE)
    assert re.search(r"^Cost: \S", text, re.MULTILINE)
    assert re.search(r"^Expected: \S", text, re.MULTILINE)


def test_run_names_are_unique():
    names = [read_yaml(ROOT / file)["name"] for file in FILES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("file", RUNS)
def test_it_resolves_and_builds(file):
    for run in runs_of(file).values():
        assert build(RunConfig, read_back(run)) == run
        assert run.model.img_size == run.data.image_size
        model = build_model(run.model, device="meta")
        assert sum(p.numel() for p in model.parameters()) == count(run.model).total


@pytest.mark.parametrize("file", COMPARISONS)
def test_twins_differ_in_their_mlps_only(file):
    arms = list(runs_of(file).values())
    assert {run.model.moe is None for run in arms} == {True, False}
    assert all(without_experts(run) == without_experts(arms[0]) for run in arms)


@pytest.mark.parametrize("file", DEBUG)
def test_a_debug_run_trains_to_what_its_header_promises(file, tmp_path):
    run = load(RunConfig, ROOT / file, [f"output_dir={tmp_path}", *LESS_WORK])
    folder, arm = train(run, show=False)
    records = read_records(folder / "records.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    evaluations = [record for record in records if record["kind"] == "eval"]
    assert evaluations[-1]["step"] == arm.length.steps

    promise = re.search(r"(training|evaluation) loss (?:from ([\d.]+) to )?below (\d+\.\d+)", header(file))
    if promise:
        what, start, bound = promise.groups()
        reached = evaluations[-1]["loss"] if what == "evaluation" else losses[-1]
        assert reached < float(bound)
        assert start is None or abs(losses[0] - float(start)) < 0.15
    assert bool(promise) == (file != "configs/debug/synthetic_native.yaml")


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("configs/train/")])
def test_a_recipe_steps_twice_when_shrunk(file, tmp_path):
    run = shrink(load(RunConfig, ROOT / file, [f"output_dir={tmp_path}"]))
    folder, arm = train(run, show=False)
    steps = [record for record in read_records(folder / "records.jsonl") if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [1, 2]
    assert all(math.isfinite(record["loss"]) for record in steps)
    sparse = runs_of(file)[""].model.moe is not None
    assert (arm.run.model.moe is not None) == sparse
    assert arm.run.model.style == runs_of(file)[""].model.style


@pytest.mark.parametrize("file", FINETUNE)
def test_a_fine_tuning_goes_on_from_what_its_header_names(file, tmp_path):
    """On a few synthetic images, from the pre-training that the header names, two steps each."""
    few = ["train.steps=2", "train.batch_size=8", "schedule.warmup_steps=1", "log.peak_flops=1e11"]
    few += ["data.name=synthetic", "data.channels=1", "data.synthetic_samples=16", f"output_dir={tmp_path}"]
    source, dense = pretraining(file)
    folder, _ = train(load(RunConfig, source, [*few, *["model.moe=null"] * dense]), show=False)
    plan = plan_finetuning(ROOT / file, folder, few)
    tuned, arm = finetune(plan, show=False)
    assert arm.run.model.moe is not None and arm.run.model.img_size == arm.run.data.image_size
    assert [record["step"] for record in read_records(tuned / "records.jsonl") if record["kind"] == "final"] == [2]


@pytest.mark.parametrize("file", COMPARISONS)
def test_a_comparison_ends_with_a_report(file, tmp_path):
    """The debug ones as they are; the others shrunk to two steps."""
    config = load(CompareConfig, ROOT / file, [f"output_dir={tmp_path}"])
    whole = Path(file).stem.startswith("debug_")
    if not whole:
        config = shrink_comparison(config)
    paths = compare(config, show=False)
    lines = read_records(tmp_path / config.name / "records.jsonl")
    assert paths is not None
    for arm in config.arms:
        steps = [line["step"] for line in lines if line["kind"] == "step" and line["arm"] == arm]
        assert steps if whole else steps == [1, 2]
        assert [line["arm"] for line in lines if line["kind"] == "final"].count(arm) == len(config.seeds)


@pytest.mark.parametrize("file", PROFILES)
def test_a_profile_sweeps_over_what_can_be(file):
    tree = read_yaml(ROOT / file)
    if tree["what"] == "layer":
        workloads, _ = build(LayerSweepConfig, listed(tree)).workloads()
        assert len(workloads) > 1
    elif tree["what"] == "model":
        found = runs_of_sweep(build(ModelSweepConfig, tree), [])
        assert not found.left_out
        for run in found.runs.values():
            assert build_model(run.model, device="meta").moe_layers()
    else:
        workloads, refused = build(ExchangeSweepConfig, listed_exchange(tree)).workloads()
        assert len({workload.bytes for workload in workloads}) >= 3 and not refused


@pytest.mark.parametrize("what", ["layer", "model"])
def test_a_debug_profile_leaves_records(what, tmp_path, monkeypatch):
    """Through the command itself; the header names what comes out."""
    file = f"configs/profile/debug_{what}.yaml"
    monkeypatch.setattr(
        sys, "argv", ["swinmoe", "profile", what, str(ROOT / file), "--rounds", "2", "--out", str(tmp_path)]
    )
    monkeypatch.chdir(ROOT)  # the model's sweep names a run's file
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    lines = read_records(tmp_path / "records.jsonl")
    dense = [line for line in lines[1:] if line["variant"]["dispatcher"] == "dense"]
    assert lines[0]["kind"] == "profile" and lines[0]["what"] == what
    assert (len(dense), len(lines)) == {"layer": (1, 6), "model": (2, 5)}[what]
    assert (tmp_path / "report.html").is_file()


NOWHERE = {
    "RunConfig.output_dir": "the user's choice, set on the command line",
    "RunConfig.resume": "a decision of the moment",
    "CompareConfig.output_dir": "as for a run",
    "CompareConfig.resume": "as for a run",
    "LogConfig.tensorboard": "needs an optional package",
    "ModelConfig.attention_chunks": "for large windows on a GPU; test_sequential.py runs it",
    "DataConfig.root": "a place on the user's machine",
    "DataConfig.train_files": "archives on the user's machine",
    "DataConfig.eval_files": "as for training",
    "DataConfig.num_classes": "of the user's archives",
    "DataConfig.label_key": "as their author named it",
    "DataConfig.index_dir": "for archives that lie where nothing may be written",
    "DataConfig.shuffle_window": "for archives on slow disks",
    "DataConfig.download": "tests stay off the network",
    "FinetuneConfig.source": "--from says it",
    "FinetuneConfig.weights": "auto is right for all; test_finetune runs the others",
    "FinetuneConfig.class_map": "a file of the user's; test_finetune has one",
    "FinetuneConfig.balance": "follows from the policy; test_finetune runs both",
    "FinetuneConfig.allow": "for files of others that do not fit",
    "UpcycleConfig.preserve": "tests of upcycling run it",
    "UpcycleConfig.seed": "as good as any other",
    "ParallelConfig.ep_size": "a file must run on one process; launch/ and the README set it",
    "ParallelConfig.weight_group": "needs ep_size > 1",
    "ParallelConfig.exchange": "needs ep_size > 1",
    "ParallelConfig.local_size": "needs ep_size > 1",
    "ParallelConfig.chunks": "needs ep_size > 1",
    "ParallelConfig.payload": "needs ep_size > 1",
    "ParallelConfig.zero": "needs several processes, and an optional package",
    "ParallelConfig.shard_dense": "needs several processes",
    "ParallelConfig.timeout_minutes": "a matter of the machine",
    "TrainConfig.compile": "takes minutes of a C++ compiler; test_train runs it",
    "TrainConfig.native_kernels": "all of them need a C++ compiler; test_train runs it",
    "TrainConfig.offload_activations": "of use on a GPU alone",
    "TrainConfig.tf32": "of use on a GPU alone",
}
"""Fields that every file leaves alone, and why."""


def settings(config: Any) -> Iterator[tuple[str, bool]]:
    """(class.field, differs from its default) of every value in a config and its sections."""
    for field in fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name == "style":
            value, default = resolve_style(value), resolve_style(default)
        if is_dataclass(value):
            yield from settings(value)
        if not is_dataclass(default):
            yield f"{type(config).__name__}.{field.name}", value != default


def test_every_option_is_used_by_some_config():
    """An option that no shipped file sets is one that nobody has ever run."""
    used: dict[str, bool] = {}
    for file in RUNS:
        comparison = [load(CompareConfig, ROOT / file)] if file in COMPARISONS else []
        for config in (*comparison, *runs_of(file).values()):
            for name, differs in settings(config):
                used[name] = used.get(name, False) or differs
    assert {name for name, differs in used.items() if not differs} == set(NOWHERE)
    assert {"StyleConfig.norm", "CapacityPolicy.factor", "BalanceLossConfig.z", "AugmentConfig.crop_padding"} <= set(
        used
    )
