"""The command line as a person meets it: results in a folder, and errors that help."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from swinmoe.cli import main
from swinmoe.records import read_records

SMALL = {
    "model": {"preset": "swin_moe_micro", "in_chans": 1, "embed_dim": 16, "num_heads": [1, 2]},
    "data": {"name": "digits", "limit": 128},
    "train": {"steps": 2, "epochs": None, "batch_size": 32},
    "log": {"every_steps": 1, "peak_flops": 1e11},
}


def _run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "swinmoe.cli", *argv],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def test_train_leaves_records_config_and_a_checkpoint(config: Path, tmp_path: Path) -> None:
    done = _run("train", str(config), f"output_dir={tmp_path}", "name=one")
    assert done.returncode == 0, done.stderr
    kinds = [line["kind"] for line in read_records(tmp_path / "one" / "records.jsonl")]
    assert kinds == ["run", "arm", "step", "step", "eval", "final"]
    assert (tmp_path / "one" / "config.yaml").is_file()
    assert sorted(p.name for p in (tmp_path / "one" / "checkpoints").iterdir()) == ["latest", "step-00000002"]
    again = _run("train", str(config), f"output_dir={tmp_path}", "name=one")
    assert again.returncode == 2 and "already holds a run; use resume=auto" in again.stderr
    report = _run("report", str(tmp_path / "one"))
    assert report.returncode == 0 and (tmp_path / "one" / "report.html").is_file(), report.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.base_lrr=1"], "unknown config key 'optim.base_lrr'; did you mean 'base_lr'"),
        (["model.moe.top_k=9"], "moe.top_k=9 is not possible with moe.num_experts=8; use 1 to 8"),
        (["parallel.ep_size=3"], "parallel.ep_size=3 does not divide model.moe.num_experts=8, nor is it a multiple"),
        (["parallel.ep_size=2"], "ep_size=2"),
        (["model.img_size=1"], "smaller than one patch"),
        (["model.in_chans=3"], "digits images have 1 channels"),
        (["data.name=fashion_mnist", "data.root=/nowhere"], "/nowhere"),
        (["data.name=folder", "data.root=/nowhere"], "/nowhere"),
        (["optim.base_lr"], "not of the form key=value"),
        (["train.batch_size=100000"], "100000"),
        (["train.steps=0"], "train.steps=0 must be at least 1; use null to count epochs"),
        (["train.ema_decay=.nan"], "train.ema_decay=nan must be in (0, 1) and finite; use e.g. 0.9999, or null"),
        (["optim.base_lr=1e999"], "optim.base_lr=inf must be above 0 and finite"),
        (["name=../elsewhere"], "name='../elsewhere' is not a plain folder name"),
        (
            ["resume=atuo"],
            "resume='atuo' is neither 'never' nor 'auto' nor a checkpoint's folder; did you mean 'auto'?",
        ),
        (["model.preset=123"], "model.preset=123 is not a name"),
    ],
)
def test_bad_input_is_one_message_and_status_2(
    config: Path,
    tmp_path: Path,
    overrides: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["swinmoe", "train", str(config), f"output_dir={tmp_path}", *overrides])
    with pytest.raises(SystemExit) as stopped:
        main()
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and errors.startswith("swinmoe: ")
    assert message in errors
    assert list(tmp_path.iterdir()) == []


def test_a_missing_config_suggests_its_neighbour(config: Path) -> None:
    done = _run("train", str(config.with_name("smal.yaml")))
    assert done.returncode == 2 and "did you mean 'small.yaml'" in done.stderr


Say = Callable[..., tuple[int, str]]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run the command line in this process; its exit status and stderr."""

    def run(*argv: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["swinmoe", *argv])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_debug_shows_the_traceback_wherever_it_stands(say: Say, config: Path, place: int) -> None:
    argv = ["train", str(config), "optim.nonsense=1"]
    status, errors = say(*argv)
    assert (status, "Traceback" in errors) == (2, False)
    argv.insert(place, "--debug")
    status, errors = say(*argv)
    assert status == 2 and errors.startswith("Traceback") and "\nswinmoe: unknown config key" in errors


def test_help_tells_of_debug(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["swinmoe", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert "--debug" in re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            ValueError("one\n two"),
            1,
            "unexpected ValueError: one two (a bug, or the machine; run again with --debug for the traceback)",
        ),
        (EOFError("short"), 1, "unexpected EOFError: short (a bug"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/records.jsonl"),
            2,
            "No space left on device: '/x/records.jsonl'; free some space",
        ),
        (OSError("odd"), 2, "odd; check the paths given"),
    ],
)
def test_whatever_ends_a_command_is_one_line(
    say: Say, config: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("swinmoe.commands.train.run", fail)
    code, errors = say("train", str(config))
    assert code == status
    assert errors.startswith(f"swinmoe: {message}") and errors.count("\n") == 1
    code, errors = say("train", str(config), "--debug")
    assert code == status and "Traceback" in errors and "in fail" in errors


def test_an_output_folder_that_cannot_be(say: Say, config: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    status, errors = say("train", str(config), f"output_dir={tmp_path / 'taken'}")
    assert status == 2 and errors.count("\n") == 1
    assert "taken" in errors and "a file stands where a folder is needed" in errors


def test_a_file_for_the_other_command(say: Say, config: Path, tmp_path: Path) -> None:
    twins = tmp_path / "twins.yaml"
    twins.write_text(yaml.safe_dump({"base": SMALL, "arms": {"sparse": {}}}))
    assert say("train", str(twins)) == (
        2,
        f"swinmoe: config file '{twins}' looks like a comparison: use swinmoe compare\n",
    )
    status, errors = say("compare", str(config))
    assert status == 2 and errors.endswith("looks like a single run: use swinmoe train\n")


def test_a_run_s_key_given_to_a_comparison(say: Say, tmp_path: Path) -> None:
    twins = tmp_path / "twins.yaml"
    twins.write_text(yaml.safe_dump({"base": SMALL, "arms": {"sparse": {}}}))
    status, errors = say("compare", str(twins), "train.steps=9")
    assert status == 2 and "'train' is a run's; both arms have base.train.steps=9, one alone arms.NAME.tr" in errors


def test_models_that_do_not_exist(say: Say) -> None:
    assert say("models", "NOPE")[0] == 2
    status, errors = say("models", "swin_micr0")
    assert status == 2 and "no named model contains 'swin_micr0'; did you mean 'swin_micro'" in errors


def test_models_lists_presets_with_counts() -> None:
    done = _run("models", "micro")
    assert done.returncode == 0 and "swin_moe_micro" in done.stdout, done.stderr
