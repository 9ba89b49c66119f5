"""`swinmoe tune capacity` on several processes finds what one process finds with their batches, and says it once."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from micro import UNBALANCED
from pool import Pool

from swinmoe.cli import app, explain
from swinmoe.commands.tune import CapacityOptions, run_capacity
from swinmoe.config import RunConfig
from swinmoe.config.io import build
from swinmoe.data import build_data
from swinmoe.errors import SwinMoEError
from swinmoe.profiling.clock import Timing
from swinmoe.profiling.tune.batches import batches_for
from swinmoe.profiling.tune.capacity import Tuning, tune_capacity
from swinmoe.profiling.tune.choose import Asked
from swinmoe.profiling.tune.passes import Mode, Seen, Workbench
from swinmoe.records import read_records
from swinmoe.train import train
from swinmoe.train.opened import Opened, open_model

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
RUN: dict[str, Any] = {
    "name": "run",
    "model": {**UNBALANCED, "drop_rate": 0.1},
    "data": {"name": "digits", "image_size": 16, "limit": 160},
    "optim": {"base_lr": 0.005},
    # 33 images do not halve, and 160 are four batches of them with a rest.
    "train": {
        "steps": 20,
        "epochs": None,
        "batch_size": 32,
        "accumulation": 2,
        "eval_batch_size": 33,
        "eval_every_epochs": None,
        "precision": "fp64",  # experts that meet other rows round otherwise
    },
    "checkpoint": {"every_epochs": 0},
    "log": {"every_steps": 20, "peak_flops": 1e11},
}
IMAGES = 96
"""Three steps of 32, or of 33: more for choosing than for checking."""
POLICIES = [
    f"model.moe.capacity={{train: {{kind: {train}, factor: 0.75}}, eval: {{kind: {evaluation}, factor: 0.75}}}}"
    for train, evaluation in (("fixed", "fixed"), ("bounded", "bounded"), ("adaptive", "dropless"))
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(build(RunConfig, {**RUN, "output_dir": str(tmp_path_factory.mktemp("tuned"))}), show=False)[0]


def opened_with(path: str, words: list[str]) -> Opened:
    return open_model(path, words, spread=True)


def bench_of(opened: Opened, mode: Mode, processes: int) -> Workbench:
    rank = opened.mesh.rank if opened.mesh.world > 1 else None
    bundle = build_data(opened.run.data, seed=opened.run.seed)
    steps = batches_for(opened.run, bundle, mode, IMAGES, processes, rank)
    return Workbench(opened, mode, [batch for step in steps for batch in step])


def tuned(path: str, mode: Mode, words: list[str], processes: int) -> Tuning:
    opened = opened_with(path, words)
    rank = opened.mesh.rank if opened.mesh.world > 1 else None
    steps = batches_for(opened.run, build_data(opened.run.data, seed=0), mode, IMAGES, processes, rank)
    return tune_capacity(opened, mode, steps, Asked(max_drop=0.05), factors=(0.5, 1.0, None), rounds=2)


def without_times(tuning: Tuning) -> Tuning:
    """Nor the ranks that shared the experts."""
    none = Timing(())
    points, layered = (
        tuple(replace(point, timing=none) for point in points) for points in (tuning.points, tuning.layered)
    )
    verdict = replace(tuning.verdict, timings=dict.fromkeys(tuning.verdict.timings, none))
    return replace(tuning, points=points, layered=layered, verdict=verdict, ep_size=1, together=1)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_two_processes_find_what_one_finds_with_their_batches(trained: Path, pool2: Pool, mode: Mode) -> None:
    one = tuned(str(trained), mode, [], 2)
    loads = next(iter(one.loads.values()))
    assert one.separate and len(loads) == (6 if mode == "train" else 4)
    assert {load.tokens // 16 for load in loads} == ({8} if mode == "train" else {16, 17})  # 16 tokens an image
    assert max(one.verdict.seen.drops.values()) > 0
    for ep_size in (1, 2):
        first, second = pool2.run(tuned, str(trained), mode, [f"parallel.ep_size={ep_size}"], 2)
        assert first == second  # times too
        assert without_times(first) == without_times(one)
        assert (first.ep_size, first.together) == (ep_size, ep_size)


def looks(path: str, words: list[str], processes: int) -> list[Seen]:
    found = []
    for mode in ("train", "eval"):
        bench = bench_of(opened_with(path, words), mode, processes)
        found += [bench.look(setting) for setting in (bench.own_setting(), bench.uniform(0.5, True))]
    return found


@pytest.mark.parametrize("dispatcher", ["ragged", "padded"])
def test_every_policy_and_layout_drops_what_its_loads_say(trained: Path, pool2: Pool, dispatcher: str) -> None:
    """`look` holds what a layer dropped against its load: each rank's own slots count, whatever size is agreed on."""
    for policy in POLICIES:
        words = [policy, f"model.moe.dispatcher={dispatcher}"]
        one = looks(str(trained), words, 2)
        assert all(seen.drop_fraction > 0.1 for seen in one if "dropless" not in policy)
        assert pool2.run(looks, str(trained), ["parallel.ep_size=2", *words], 2) == [one, one]


def test_a_rank_without_images_takes_part(trained: Path, pool2: Pool) -> None:
    words = ["train.eval_batch_size=1"]
    one = looks(str(trained), words, 2)[2:]
    assert {len(seen.correct) for seen in one} == {len(loads) for s in one for loads in s.loads.values()} == {IMAGES}
    for found in pool2.run(looks, str(trained), ["parallel.ep_size=2", *words], 2):
        assert found[2:] == one


def holdings(path: str) -> tuple[int, int, int]:
    opened = opened_with(path, ["parallel.ep_size=2"])
    (held,) = {p.shape[0] for layer in opened.model.moe_layers().values() for p in layer.experts.parameters()}
    return opened.mesh.rank, held, len(opened.source.found.named)


def test_each_rank_keeps_its_own_experts_alone(trained: Path, pool2: Pool) -> None:
    assert pool2.run(holdings, str(trained)) == [(0, 2, 0), (1, 2, 0)]


def gradients(path: str) -> list[torch.Tensor]:
    """Of three steps of training: no step waits for a sum that nobody asks for."""
    bench = bench_of(opened_with(path, ["parallel.ep_size=2"]), "train", 4)
    for _ in range(3):
        bench.step(bench.uniform(1.0))
    return [p.grad for p in bench.model.parameters() if p.grad is not None]


def test_steps_repeat_where_experts_have_replicas(trained: Path, pool4: Pool) -> None:
    for found in pool4.run(gradients, str(trained)):
        assert found and all(bool(torch.isfinite(grad).all()) for grad in found)


def launch(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "launch" / "local.sh"), "--processes", "2", "tune", "capacity", *map(str, words)],
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def recommended(out: Path) -> list[dict[str, Any]]:
    lines = [line for line in read_records(out / "records.jsonl") if line["kind"] == "recommendation"]
    return [{key: value for key, value in line.items() if key != "ms"} for line in lines]


def test_the_command_prints_and_writes_once(trained: Path, tmp_path: Path) -> None:
    asked = (trained, "--max-drop", "0.05", "--images", IMAGES, "--rounds", "1", "--factors", "0.5,dropless")
    with pytest.raises(SystemExit) as ended:
        app(["tune", "capacity", *map(str, asked), "--processes", "2", "--out", str(tmp_path / "one")])
    two = tmp_path / "two"
    done = launch(*asked, "parallel.ep_size=2", "--out", two)
    assert done.returncode == ended.value.code, done.stderr
    assert done.stdout.count("experts spread over 2") == done.stdout.count("evaluation: every layer drops") == 1
    assert done.stderr.count("written to") == 1
    assert sorted(path.name for path in two.iterdir()) == ["records.jsonl", "tune.png", "tuned.yaml"]
    assert [line["kind"] for line in read_records(two / "records.jsonl")].count("profile") == 1
    assert recommended(two) == recommended(tmp_path / "one")
    configs = [yaml.safe_load((out / "tuned.yaml").read_text()) for out in (tmp_path / "one", two)]
    assert [config["parallel"].pop("ep_size") for config in configs] == [1, 2]
    assert configs[0] == configs[1]


def ended(path: str, out: str, words: list[str]) -> str:
    """How the command ends on this rank, whatever it prints."""
    options = CapacityOptions(Asked(max_drop=0.5), "eval", images=1, factors=(None,), rounds=1)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return f"status {run_capacity(Path(path), words, options, which='auto', out=Path(out))}"
    except (SwinMoEError, OSError) as error:
        return explain(error)[1]


def test_what_cannot_be_done_ends_all_ranks_alike(trained: Path, tmp_path: Path, pool2: Pool) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "records.jsonl").write_text("mine\n")
    (tmp_path / "file").touch()
    for out, words, said in (
        (used, [], "holds records already"),
        (tmp_path / "file", [], "is a file; give a folder"),
        (tmp_path / "file" / "out", [], "a file stands where a folder is needed"),  # found out by the rank that writes
        (tmp_path / "new", ["parallel.ep_size=4"], "does not divide the number of processes 2"),
    ):
        first, second = pool2.run(ended, str(trained), str(out), words)
        assert said in first and first == second
    assert [path.name for path in used.iterdir()] == ["records.jsonl"] and not (tmp_path / "new").exists()
    assert pool2.run(ended, str(trained), str(tmp_path / "new"), []) == ["status 0"] * 2
