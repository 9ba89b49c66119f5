"""`swinmoe tune capacity`: from a trained checkpoint to a config that keeps what was asked, or a failure saying so."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from micro import UNBALANCED
from PIL import Image
from rich.console import Console

from swinmoe.cli import app
from swinmoe.commands import tune
from swinmoe.config import RunConfig
from swinmoe.config.io import build, load
from swinmoe.data import build_data
from swinmoe.errors import ConfigError
from swinmoe.profiling.tune.batches import Steps, batches_for, halves
from swinmoe.profiling.tune.capacity import factors_for, tune_capacity
from swinmoe.profiling.tune.choose import Asked
from swinmoe.profiling.tune.passes import Setting, Workbench
from swinmoe.records import read_records
from swinmoe.train import train
from swinmoe.train.finetune import plan_finetuning
from swinmoe.train.opened import Opened, open_model

RUN: dict[str, Any] = {
    "name": "run",
    "model": UNBALANCED,
    "data": {"name": "digits", "image_size": 16, "limit": 320},
    "optim": {"base_lr": 0.005},
    "train": {"steps": 30, "epochs": None, "batch_size": 32, "eval_batch_size": 40, "eval_every_epochs": None},
    "checkpoint": {"every_epochs": 0},
    "log": {"every_steps": 30, "peak_flops": 1e11},
}
LAYERS = ("layers.0.blocks.1.mlp", "layers.1.blocks.1.mlp")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(build(RunConfig, {**RUN, "output_dir": str(tmp_path_factory.mktemp("tuned"))}), show=False)[0]


@pytest.fixture(scope="module")
def opened(trained: Path) -> Opened:
    return open_model(trained)


def steps_of(opened: Opened, mode: Any, images: int, processes: int = 1, rank: int | None = None) -> Steps:
    return batches_for(opened.run, build_data(opened.run.data, seed=0), mode, images, processes, rank)


def bench_of(opened: Opened, mode: Any, images: int = 160) -> Workbench:
    return Workbench(opened, mode, [batch for (batch,) in steps_of(opened, mode, images)])


def check_loads(trained: Path, records: list[dict[str, Any]]) -> None:
    """Every batch's choices are recorded as the layers themselves count them; dropless, so all are kept."""
    found = {(line["mode"], line["layer"]): line for line in records if line["kind"] == "expert_loads"}
    assert set(found) == {(mode, layer) for mode in ("train", "eval") for layer in LAYERS}
    opened = open_model(trained, ["model.moe.capacity={train: {kind: dropless}, eval: {kind: dropless}}"])
    counts: dict[str, list[list[int]]] = {layer: [] for layer in LAYERS}
    for batch in halves(steps_of(opened, "eval", 320))[0]:
        for layer, stats in opened.model(batch.images).routing.items():
            counts[layer].append(stats.kept.tolist())
    for layer in LAYERS:
        line = found["eval", layer]
        assert line["routed"] == counts[layer] and len(counts[layer]) > 1
        assert [sum(row) for row in line["routed"]] == [line["top_k"] * tokens for tokens in line["tokens"]]
        routed = torch.tensor(counts[layer], dtype=torch.float64)
        assert line["expert_imbalance"] == pytest.approx(float((routed.amax(1) / routed.mean(1)).mean()))
        assert line["rank_imbalance"] is None and line["ep_size"] == 1


def test_a_tuned_config_keeps_what_was_asked(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["tune", "capacity", str(trained), "--max-drop", "0.05", "--images", "320", "--rounds", "2"]
    words += ["--factors", "0.5,1,dropless", "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        app(words)
    said = capsys.readouterr().out
    records = read_records(out / "records.jsonl")
    found = {line["mode"]: line for line in records if line["kind"] == "recommendation"}
    assert set(found) == {"train", "eval"}
    assert ended.value.code == int(any(line["failures"] for line in found.values()))
    for line in found.values():
        assert line["separate"] and set(line["factors"]) == set(LAYERS)
        assert max(line["chosen"]["drops"].values()) <= 0.05
        kept = max(line["checked"]["drops"].values()) <= 0.05
        assert kept == (not line["failures"])
        assert line["dropless"]["drop_fraction"] == 0.0
    assert ("NOT met" in said) == bool(ended.value.code)
    check_loads(trained, records)
    named = [line["name"] for line in records if line["kind"] == "measurement"]
    assert len(named) == len(set(named)) == 2 * (2 * 3 + 1)
    with Image.open(out / "tune.png") as picture:
        assert picture.size[0] > 400

    tuned = load(RunConfig, out / "tuned.yaml")
    assert tuned.name == "run_tuned" and tuned.train.steps == 30
    moe = tuned.model.moe
    assert moe is not None
    for layer in LAYERS:
        own = moe.capacity.of(layer)
        assert (own.train.kind, own.train.factor) == ("fixed", found["train"]["factors"][layer])
        assert (own.eval.kind, own.eval.factor) == ("bounded", found["eval"]["factors"][layer])
    again = open_model(trained, [str(out / "tuned.yaml")])
    checking = halves(steps_of(again, "eval", 320))[1]
    seen = Workbench(again, "eval", checking).look(bench_of(again, "eval").own_setting())
    assert seen.drops == found["eval"]["checked"]["drops"]  # what was checked is what the file gives
    plan = plan_finetuning(out / "tuned.yaml", trained)
    assert plan.run.model.moe == moe


def test_a_constraint_that_cannot_be_kept_fails_and_says_why(trained: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    words = ["tune", "capacity", str(trained), "--max-drop", "0.01", "--mode", "eval", "--images", "160"]
    words += ["--rounds", "1", "--factors", "0.25,0.5", "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        app(words)
    assert ended.value.code == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "NOT met" in said and "1 % are allowed" in said and "Give larger --factors" in said
    assert "NOT met" in (out / "tuned.yaml").read_text()
    layers = yaml.safe_load((out / "tuned.yaml").read_text())["model"]["moe"]["capacity"]["layers"]
    assert {own["eval"]["factor"] for own in layers.values()} == {0.5}
    with pytest.raises(ConfigError, match="holds records already"):
        app(words)


def test_the_fastest_within_an_accuracy_is_verified(opened: Opened) -> None:
    steps = steps_of(opened, "eval", 320)
    found = tune_capacity(opened, "eval", steps, Asked(within=50.0), factors=(0.25, None), rounds=1)
    assert not found.verdict.failures and found.separate
    everything = tune_capacity(opened, "eval", steps[:1], Asked(within=0.0), factors=(None,), rounds=1)
    assert not everything.separate and not everything.verdict.failures


def test_no_drops_asked_means_dropless(opened: Opened) -> None:
    bench = bench_of(opened, "eval")
    loads = bench.look(bench.uniform(None)).loads
    assert set(factors_for(bench, loads, 0.0, (0.5, None)).factors.values()) == {None}
    assert set(factors_for(bench, loads, 0.0, (0.5, 0.75)).factors.values()) == {0.75}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_factors_hold_for_the_loads_that_they_lead_to(opened: Opened, mode: Any) -> None:
    bench = bench_of(opened, mode)
    for level in (0.02, 0.2):
        setting = factors_for(bench, bench.look(bench.uniform(None)).loads, level, (None,))
        seen = bench.look(setting)
        assert all(0 < drop <= level for drop in seen.drops.values())


def test_a_pass_repeats_itself_and_leaves_the_model_as_it_was(opened: Opened) -> None:
    """Draws of training are keyed by the batch: settings are compared on the same noise."""
    bench = bench_of(opened, "train")
    before = {name: layer.cfg for name, layer in bench.layers.items()}
    setting = Setting(dict.fromkeys(LAYERS, 0.5), True)
    first = bench.look(setting)
    bench.look(bench.uniform(None))
    bench.step(setting)
    bench.forget_gradients()
    assert bench.look(setting) == first and first.drop_fraction > 0.1
    assert {name: layer.cfg for name, layer in bench.layers.items()} == before
    assert not opened.model.training and all(p.grad is None for p in opened.model.parameters())


def test_batches_are_as_large_as_one_process_sees_them(opened: Opened) -> None:
    for mode, whole in (("train", 32), ("eval", 40)):
        alone, shared = (steps_of(opened, mode, 80, processes) for processes in (1, 2))
        assert {len(batch) for step in alone for batch in step} == {whole}
        assert {len(batch) for step in shared for batch in step} == {whole // 2}
        images = [sorted(torch.cat([b.indices for step in steps for b in step]).tolist()) for steps in (alone, shared)]
        assert images[0] == images[1]


@pytest.mark.parametrize(("mode", "size"), [("train", 68), ("eval", 33)])
def test_batches_of_the_ranks_are_those_of_all(trained: Path, mode: Any, size: int) -> None:
    words = ["train.batch_size=68", "train.accumulation=2", "train.eval_batch_size=33"]
    opened = open_model(trained, words)
    data = build_data(opened.run.data, seed=0)
    there = len(data.train if mode == "train" else data.eval)
    assert there % size, "nothing to leave out"
    for images, wanted in ((1, 2 * size), (3 * size, 3 * size), (10**6, there // size * size)):
        together = steps_of(opened, mode, images, 2)
        seen = [index for step in together for batch in step for index in batch.indices.tolist()]
        assert len(seen) == len(set(seen)) == wanted
        for rank in (0, 1):
            own = steps_of(opened, mode, images, 2, rank)
            assert [[b.indices.tolist() for b in step] for step in own] == [
                [step[rank].indices.tolist()] for step in together
            ]
        parts = [{i for batch in half for i in batch.indices.tolist()} for half in halves(together)]
        assert parts[0] | parts[1] == set(seen) and not parts[0] & parts[1]


def test_a_launcher_says_how_many_processes_there_are(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for given in ("1", "4"):
        with pytest.raises(ConfigError, match=f"--processes {given} under a launcher that started 2.*leave --proc"):
            app(["tune", "capacity", str(trained), "--max-drop", "0.1", "--processes", given])


def test_options_that_mean_nothing_are_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for words, said in (
        ((), "one of them"),
        (("--max-drop", "0.1", "--within", "1"), "one of them"),
        (("--max-drop", "1"), r"must be in \[0, 1\)"),
        (("--within", "100"), r"must be in \[0, 100\)"),
        (("--max-drop", "0.1", "--mode", "test"), "use one of both, train, eval"),
        (("--max-drop", "0.1", "--factors", "1,x"), "--factors '1,x': 'x' is neither"),
        (("--max-drop", "0.1", "--images", "0"), "--images 0 must be at least 1"),
        (("--max-drop", "0.1", "--processes", "0"), "--processes 0 must be at least 1"),
        (("--max-drop", "0.1", "--out", str(tmp_path / "file")), "is a file; give a folder"),
    ):
        with pytest.raises(ConfigError, match=said):
            app(["tune", "capacity", str(trained), *words])


def test_a_dense_model_has_no_capacity(tmp_path: Path) -> None:
    tree = {**RUN, "model": {**RUN["model"], "moe": None, "moe_blocks": []}, "output_dir": str(tmp_path)}
    folder, _ = train(build(RunConfig, {**tree, "train": {**RUN["train"], "steps": 1}}), show=False)
    with pytest.raises(ConfigError, match="needs a sparse model"):
        app(["tune", "capacity", str(folder), "--max-drop", "0.1"])


def test_without_a_folder_the_keys_are_printed(opened: Opened, trained: Path, capsys: Any) -> None:
    steps = steps_of(opened, "eval", 160)
    found = tune_capacity(opened, "eval", steps, Asked(max_drop=0.1), factors=(1.0, None), rounds=1)
    text = io.StringIO()
    tune.show(found, Console(file=text, width=200))
    assert all(layer in text.getvalue() for layer in LAYERS) and "by layer, 10 % drops" in text.getvalue()
    options = tune.CapacityOptions(Asked(max_drop=0.1), "eval", 80, 1, (None,), 1)
    tune.run_capacity(trained, [], options, which="auto", out=None)
    printed = capsys.readouterr().out
    assert "# model.moe.capacity.layers" in printed and f"{LAYERS[0]}:" in printed


def test_ranks_that_share_experts_are_told_how_busy_they_are(opened: Opened) -> None:
    """As the run that trained the model shared them, whatever runs here."""
    trained = opened.source.run
    assert trained is not None
    shared = replace(trained, parallel=replace(trained.parallel, ep_size=2))
    opened = replace(opened, source=replace(opened.source, run=shared))
    for processes, together in ((1, 1), (2, 2), (4, 2)):
        steps = steps_of(opened, "eval", 160, processes)
        found = tune_capacity(opened, "eval", steps, Asked(max_drop=0.9), factors=(None,), rounds=1)
        assert (found.ep_size, found.together) == (2, together)
        for layer in LAYERS:
            experts = torch.tensor([load.routed for load in found.loads[layer]], dtype=torch.float64)
            ranks = experts.view(-1, together, 2, 2).sum((1, 3))
            assert found.rank_imbalance(layer) == pytest.approx(float((ranks.amax(1) / ranks.mean(1)).mean()))
        text = io.StringIO()
        tune.show(found, Console(file=text, width=250))
        assert "busiest of 2 ranks / mean" in text.getvalue()
        assert f"{found.rank_imbalance(LAYERS[0]):.2f}" in text.getvalue()
