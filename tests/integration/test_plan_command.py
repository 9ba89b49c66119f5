"""`swinmoe plan` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swinmoe.cli import app, explain
from swinmoe.config import RunConfig
from swinmoe.config.io import load
from swinmoe.errors import ConfigError

CONFIG = "configs/debug/digits_swin_moe.yaml"
GIANT = ("model.preset=swin_v2_g_192_w12", "train.precision=bf16", "train.batch_size=1024")


def invoke(*words: str) -> str:
    done = CliRunner().invoke(app, ["plan", *words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_ranks_are_planned_and_the_best_can_be_trained(tmp_path: Path) -> None:
    out = tmp_path / "best.yaml"
    shown = invoke(CONFIG, "train.batch_size=64", "--ranks", "8", "--hardware", "a100", "--out", str(out))
    assert "8 ranks: parallel.ep_size=" in shown and "images/s" in shown
    written = load(RunConfig, out)
    assert written.train.batch_size == 64 and written.model == load(RunConfig, CONFIG).model
    assert out.read_text().startswith("# Planned for 8 ranks of A100")


def test_json_has_every_way_best_first() -> None:
    found = json.loads(invoke(CONFIG, "--ranks", "1,8", "--batch", "8", "--json"))
    assert set(found) == {"1", "8"}
    seconds = [way["seconds"] for way in found["8"]]
    assert len(seconds) > 5 and seconds == sorted(seconds)
    assert found["8"][0]["images"] == 64
    assert found["8"][0]["memory"]["total"] == pytest.approx(
        sum(value for key, value in found["8"][0]["memory"].items() if key != "total")
    )


def test_a_giant_is_said_not_to_fit_and_made_to() -> None:
    config = "configs/train/swin_v2_l_192_w12_22k.yaml"
    alone = invoke(config, *GIANT, "--ranks", "8", "--hardware", "a100", "--processes-per-node", "8")
    assert "too large" in alone and "micro-batches" in alone
    small = invoke(config, *GIANT, "--ranks", "1", "--hardware", "cpu", "--batch", "1")
    # Two moments of 3.0 billion parameters and of a head of 21,841 classes, 4 bytes each
    assert "nothing fits" in small and "moments 23.0" in small


def test_a_dry_run_says_who_holds_what() -> None:
    shown = invoke(CONFIG, "parallel.ep_size=4", "--dry-run", "64", "--batch", "2")
    assert "rank 63 of 64: experts 6 to 7" in shown and "the plan holds" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "needs a config"),
        ((CONFIG, "--ranks", "1,two"), "--ranks 1,two: give numbers from 1 up"),
        ((CONFIG, "--ranks", "1,2", "--out", "x.yaml"), "takes the best way for one number of ranks"),
        ((CONFIG, "--ranks", "8", "--hardware", "b200"), "neither a file nor one of"),
        ((CONFIG, "--ranks", "7"), "cannot be split evenly over 7 ranks"),
        ((CONFIG, "--dry-run", "6", "parallel.ep_size=4", "--batch", "2"), "does not divide 6 ranks"),
        (("--calibrate", "no/such/folder/x.yaml"), "does not exist; make it first"),
    ],
)
def test_what_cannot_be_planned_says_why(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        invoke(*words)
    assert message in str(caught.value)
    assert explain(caught.value)[0] == 2
