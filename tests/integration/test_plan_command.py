"""`swinmoe plan` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swinmoe.cli import app, explain
from swinmoe.commands import plan
from swinmoe.config import RunConfig
from swinmoe.config.io import load, to_tree
from swinmoe.errors import ConfigError
from swinmoe.profiling.plan.hardware import load_hardware
from swinmoe.profiling.plan.predict import Scene, predict

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


@pytest.mark.parametrize(("ranks", "payload"), [("1", "full"), ("2", "bf16")])
def test_a_rounded_payload_goes_where_no_token_travels(ranks: str, payload: str, tmp_path: Path) -> None:
    out = tmp_path / "best.yaml"
    words = ("parallel.ep_size=2", "parallel.payload=bf16", "--ranks", ranks, "--hardware", "a100", "--out", str(out))
    assert f"parallel.payload={payload}" in invoke(CONFIG, *words)
    parallel = load(RunConfig, out).parallel
    assert parallel.payload == payload and (parallel.token_group > 1) == (payload == "bf16")


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


def test_measured_steps_make_a_better_description(tmp_path: Path) -> None:
    """Steps as of a machine half as fast, in records as `profile model` writes them: the plan then says so too."""
    known = load_hardware("cpu")
    slow = known.scaled("slow", 2.0)
    records = tmp_path / "records.jsonl"
    lines = []
    for batch in (8, 16, 32):
        run = load(RunConfig, CONFIG, [f"train.batch_size={batch}"])
        seconds = predict(run, Scene(slow, 1, imbalance=1.0)).seconds
        times = {"ms": {"median": 1e6}, "balanced_ms": 1000 * seconds}
        lines.append({"kind": "measurement", "name": f"of {batch}", "run": to_tree(run), **times})
    for line, backward in zip([*lines, {**lines[0], "balanced_ms": 1e9}], (True, True, True, False), strict=True):
        line["variant"] = {"world": 1, "backward": backward}
        with records.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    better = tmp_path / "better.yaml"
    invoke("--hardware", "cpu", "--calibrate", str(better), "--refine", str(records))
    held = load(RunConfig, "configs/debug/digits_dense_v2.yaml")
    before, truth, after = (
        predict(held, Scene(machine, 1)).seconds for machine in (known, slow, load_hardware(str(better)))
    )
    assert truth > 1.8 * before and after == pytest.approx(truth, rel=0.1)


def test_records_without_training_steps_refine_nothing(tmp_path: Path) -> None:
    records, better = tmp_path / "records.jsonl", tmp_path / "better.yaml"
    records.write_text(json.dumps({"kind": "measurement", "what": "layer", "name": "a", "variant": {}}) + "\n")
    with pytest.raises(ConfigError, match="no training step of a whole model in it"):
        invoke("--calibrate", str(better), "--refine", str(records))
    with pytest.raises(ConfigError, match="say where with --calibrate FILE"):
        invoke("--refine", str(records))
    assert not better.exists()


def test_a_dry_run_says_what_it_puts_aside() -> None:
    words = ("train.ema_decay=0.99", "train.offload_activations=true", "train.precision=bf16")
    shown = invoke(CONFIG, *words, "--dry-run", "4", "--batch", "2")
    aside = [line for line in shown.splitlines() if line.startswith("set aside: ")]
    assert [word for word in words if not any(word.lower() in line.lower() for line in aside)] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "needs a config"),
        ((CONFIG, "--ranks", "1,two"), "--ranks 1,two: give numbers from 1 up"),
        ((CONFIG, "--ranks", "1,2", "--out", "x.yaml"), "takes the best way for one number of ranks"),
        ((CONFIG, "--ranks", "8", "--hardware", "b200"), "neither a file nor one of"),
        ((CONFIG, "--ranks", "7"), "cannot be split evenly over 7 ranks"),
        ((CONFIG, "--dry-run", "0"), "--dry-run 0: give a number of ranks from 1 up"),
        ((CONFIG, "--dry-run", "2", "--out", "x.yaml"), "--out takes the best way of a plan, and --dry-run makes none"),
        ((CONFIG, "--ranks", "2", "--imbalance", "-3"), "--imbalance -3.0 must be at least 1"),
        ((CONFIG, "--dry-run", "6", "parallel.ep_size=4", "--batch", "2"), "does not divide 6 ranks"),
        ((CONFIG, "--ranks", "1", "--out", "no/such/folder/x.yaml"), "--out no/such/folder/x.yaml: the folder"),
        ((CONFIG, "--ranks", "1", "--out", "configs"), "--out configs is a folder; give a file"),
        (("--calibrate", "no/such/folder/x.yaml"), "does not exist; make it first"),
    ],
)
def test_what_cannot_be_planned_says_why(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        invoke(*words)
    assert message in str(caught.value)
    assert explain(caught.value)[0] == 2


def test_a_file_that_cannot_be_written_is_refused_before_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "search", lambda *_: pytest.fail("searched"))
    with pytest.raises(ConfigError, match="does not exist; make it first"):
        invoke(CONFIG, "--ranks", "1", "--out", "no/such/folder/x.yaml")
