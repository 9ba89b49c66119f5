"""`swinmoe inspect` and `swinmoe diff` on the checkpoints of a real run; being told to stop."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from crashes import RUN, curve, run_config, tensors
from typer.testing import CliRunner

from swinmoe import from_pretrained
from swinmoe.checkpoint import Saver, checkpoints, load_checkpoint
from swinmoe.cli import app
from swinmoe.errors import Preempted
from swinmoe.train import train
from swinmoe.train.arm import Arm
from swinmoe.train.loss_scale import LossScale

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with three checkpoints."""
    folder = tmp_path_factory.mktemp("inspected")
    train(run_config(folder, checkpoint={"every_steps": 6, "keep_last": 9}), show=False)
    return folder


def _swinmoe(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def test_inspect_shows_steps_experts_and_hashes(run: Path) -> None:
    status, said = _swinmoe("inspect", run / "run")
    assert status == 0 and "step-00000006" in said and "complete" in said
    newest = run / "run" / "checkpoints" / "step-00000016"
    status, said = _swinmoe("inspect", newest, "--verify")
    assert status == 0
    for part in (
        "checkpoint at step 16",
        "4 experts",
        "*.fc1.weight  4 of float32",
        "verified: all",
        "arm model: step 16",
    ):
        assert part in said, said
    digest = next(r for n, r in _manifest(newest).items() if n.startswith("model-"))["sha256"]["head.weight"]
    assert digest[:12] in said
    status, said = _swinmoe("inspect", newest, "--tensors")
    assert "3" in said and "*." not in said


def _manifest(path: Path) -> dict:
    return yaml.safe_load((path / "manifest.json").read_text())["files"]


def test_diff_says_what_differs(run: Path) -> None:
    folder = run / "run" / "checkpoints"
    status, said = _swinmoe("diff", folder / "step-00000016", folder / "step-00000016")
    assert status == 0 and "the same" in said
    status, said = _swinmoe("diff", folder / "step-00000006", folder / "step-00000016")
    assert status == 1 and "state: step is 6, and 16" in said and "numbers differ, by" in said


def test_a_model_comes_straight_from_a_run(run: Path) -> None:
    model = from_pretrained(run / "run")
    saved = load_checkpoint(run / "run" / "checkpoints" / "step-00000016").tensors
    assert torch.equal(model.head.weight, saved["model"]["head.weight"])
    average = from_pretrained(run / "run" / "checkpoints" / "step-00000016", which="average")
    assert torch.equal(average.head.weight, saved["average"]["head.weight"])
    with torch.no_grad():
        assert model(torch.rand(2, 1, *model.img_size)).logits.isfinite().all()


@pytest.mark.parametrize("told", ["the process", "one rank of two", "launcher and ranks alike"])
def test_told_to_stop_it_saves_and_says_so_by_its_status(tmp_path: Path, told: str) -> None:
    """Status 75, all ranks after the same step, though one alone was told, or all of them twice."""
    processes = 1 if told == "the process" else 2
    number = signal.SIGUSR1 if told == "one rank of two" else signal.SIGTERM
    tree = RUN | {
        "train": {**RUN["train"], "steps": 400, "eval_every_epochs": None},
        "checkpoint": {"every_epochs": 0, "asynchronous": processes == 1},
        "parallel": {"ep_size": processes},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    launcher = [str(ROOT / "launch" / "local.sh"), "--processes", str(processes), "--max-restarts", str(processes - 1)]
    job = subprocess.Popen(
        [*launcher, "train", str(tmp_path / "run.yaml"), f"output_dir={tmp_path}", "resume=auto"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    records = tmp_path / "run" / "records.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and (not records.exists() or records.read_text().count('"kind":"step"') < 3):
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.02)
    if told == "one rank of two":
        os.kill(_children(job.pid)[-1], number)
    else:
        os.killpg(job.pid, number)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 75, said
    assert said.count(f"swinmoe: stopped by {number.name} after step") == 1 and "starting again" not in said, said
    [saved] = checkpoints(tmp_path / "run" / "checkpoints")
    assert load_checkpoint(saved).state["arms"]["model"]["step"] == int(saved.name.removeprefix("step-")) < 400


def _children(parent: int) -> list[int]:
    """Processes of swinmoe that `parent` started, oldest first."""
    started = [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return [child for child in started if b"swinmoe.cli" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_after_a_stop_the_run_goes_on_as_if_nothing_had_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes in the middle of a step; that step is finished, saved, and the rest follows from it."""
    train(run_config(tmp_path / "whole"), show=False)
    sound = Arm.train_step

    def struck(self: Arm, batches: object) -> None:
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        sound(self, batches)  # type: ignore[arg-type]

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(Arm, "train_step", struck)
        with pytest.raises(Preempted, match="stopped by SIGTERM after step 7, which is saved; go on with resume=auto"):
            train(run_config(tmp_path / "stopped"), show=False)
    assert signal.getsignal(signal.SIGTERM) == before
    train(run_config(tmp_path / "stopped", resume="auto"), show=False)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    ours, theirs = tensors(tmp_path / "stopped"), tensors(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_told_to_stop_while_the_last_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """All steps are done, the last files are on their way: they come to their end, and then the run says so."""
    sound, killed = Saver.finish, []

    def struck(self: Saver) -> None:
        if self.in_flight and self.last_step == 16:
            os.kill(os.getpid(), signal.SIGTERM)
        sound(self)

    monkeypatch.setattr(Saver, "finish", struck)
    before = signal.signal(signal.SIGTERM, lambda *_: killed.append(1))  # what would have ended the process
    try:
        with pytest.raises(Preempted, match="stopped by SIGTERM after step 16, which is saved"):
            train(run_config(tmp_path, checkpoint={"asynchronous": asynchronous}), show=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not killed
    assert load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1]).step == 16
    train(run_config(tmp_path, resume="auto"), show=False)  # nothing is left to do


def test_a_run_goes_on_from_where_all_its_steps_had_overflowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW has no moments before its first step; float16 needs a GPU, its loss scale does not."""
    monkeypatch.setattr("swinmoe.train.arm.make_loss_scale", lambda _: LossScale(2.0**68, dynamic=True))
    train(run_config(tmp_path, checkpoint={"keep_last": 99}), show=False)
    folder = tmp_path / "run" / "checkpoints"
    lines, final = curve(tmp_path), tensors(tmp_path)
    for path in checkpoints(folder)[1:]:
        shutil.rmtree(path)
    [first] = checkpoints(folder)
    assert "optimizer" not in load_checkpoint(first).tensors and any("exp_avg" in name for name in final)
    train(run_config(tmp_path, resume="auto"), show=False)
    assert curve(tmp_path) == lines
    assert all(torch.equal(tensor, final[name]) for name, tensor in tensors(tmp_path).items())
