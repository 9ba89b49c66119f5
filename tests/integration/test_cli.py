"""The command line as a person meets it: results in a folder, and errors that help."""

from __future__ import annotations

import os
import subprocess
import sys
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
    assert [p.name for p in (tmp_path / "one" / "checkpoints").iterdir()] == ["step-00000002"]
    again = _run("train", str(config), f"output_dir={tmp_path}", "name=one")
    assert again.returncode == 2 and "already holds a run; use resume=auto" in again.stderr
    report = _run("report", str(tmp_path / "one"))
    assert report.returncode == 0 and (tmp_path / "one" / "report.html").is_file(), report.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.base_lrr=1"], "unknown config key 'optim.base_lrr'; did you mean 'base_lr'"),
        (["model.moe.top_k=9"], "moe.top_k=9 is not possible with moe.num_experts=8; use 1 to 8"),
        (["parallel.ep_size=3"], "parallel.ep_size=3 does not divide model.moe.num_experts=8; use one of [1, 2, 4, 8]"),
        (["parallel.ep_size=2"], "ep_size=2"),
        (["model.img_size=1"], "smaller than one patch"),
        (["model.in_chans=3"], "digits images have 1 channels"),
        (["data.name=fashion_mnist", "data.root=/nowhere"], "/nowhere"),
        (["data.name=folder", "data.root=/nowhere"], "/nowhere"),
        (["optim.base_lr"], "not of the form key=value"),
        (["train.batch_size=100000"], "100000"),
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


def test_debug_shows_the_traceback(config: Path) -> None:
    done = _run("--debug", "train", str(config), "optim.nonsense=1")
    assert done.returncode != 0 and "Traceback" in done.stderr and "unknown config key" in done.stderr


def test_models_lists_presets_with_counts() -> None:
    done = _run("models", "micro")
    assert done.returncode == 0 and "swin_moe_micro" in done.stdout, done.stderr
