"""`swinmoe profile` and `train --trace` as a person meets them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from swinmoe.cli import main
from swinmoe.records import read_records

ROOT = Path(__file__).parents[2]
Command = Callable[..., tuple[int, str, str]]
SMALL = ("--tokens", "32", "--dim", "8", "--hidden", "16", "--rounds", "2")


@pytest.fixture
def swinmoe(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line here: (exit status, what it said on stdout and on stderr)."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RANK", raising=False)

    def run(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["swinmoe", *map(str, argv)])
        with pytest.raises(SystemExit) as done:
            main()
        said = capfd.readouterr()
        return int(done.value.code or 0), said.out, said.err

    return run


def test_a_sweep_over_layers(swinmoe: Command, tmp_path: Path) -> None:
    options = ("--experts", "2,4", "--dispatcher", "ragged,padded", "--capacity", "1.25", "--skew", "1")
    out, trace = tmp_path / "out", tmp_path / "trace.json"
    status, table, said = swinmoe("profile", "layer", *SMALL, *options, "--out", out, "--trace", trace)
    assert status == 0, said
    begun, *lines = read_records(out / "records.jsonl")
    assert begun["kind"] == "profile" and begun["workload"]["experts"] == [2, 4]
    assert begun["command"].startswith("swinmoe profile layer --tokens 32")
    names = [line["name"] for line in lines]
    assert names == [
        "dense T32 D8 F16",
        *(f"{d} E{e} k1 fixed 1.25, skew 1" for e in (2, 4) for d in ("ragged", "padded")),
    ]
    assert all(name in table for name in names) and "exch. out" in table
    assert f"trace: {trace}, for ui.perfetto.dev" in said
    assert {"phases"} <= {event.get("cat") for event in json.loads(trace.read_text())["traceEvents"]}
    status, _, said = swinmoe("profile", "layer", *SMALL, "--out", out)
    assert status == 2 and "holds records already; give another --out" in said


def test_a_profile_that_was_interrupted_is_told_and_measured_again(swinmoe: Command, tmp_path: Path) -> None:
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    assert swinmoe("profile", "layer", *SMALL, "--out", whole)[0] == 0
    begun.mkdir()
    (begun / "records.jsonl").write_text((whole / "records.jsonl").read_text().splitlines(keepends=True)[0])
    status, _, said = swinmoe("report", whole, begun, "--out", tmp_path / "page")
    assert status == 2 and "begun' holds the beginning of a profile and no measurement; measure again" in said
    assert not (tmp_path / "page").exists()
    assert swinmoe("profile", "layer", *SMALL, "--out", begun)[0] == 0
    assert [line["kind"] for line in read_records(begun / "records.jsonl")].count("profile") == 1
    assert swinmoe("report", whole, begun, "--out", tmp_path / "page")[0] == 0


@pytest.mark.parametrize("why", ["", "no compiler"])
def test_a_profile_says_who_computes_the_experts(
    why: str, swinmoe: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swinmoe.moe.expert_kernel.why_no_kernels", lambda: why)
    how = f"torch's operators, not our kernel ({why})" if why else "our kernel in C++"
    _, said, _ = swinmoe("profile", "layer", *SMALL, "--out", tmp_path / "out")
    assert f"experts by {how}\n" in said
    dense, sparse = (line for line in read_records(tmp_path / "out" / "records.jsonl") if line["kind"] == "measurement")
    assert sparse["experts_in_kernel"] is not bool(why) and sparse["experts_in_kernel_reason"] == (why or None)
    assert dense.get("experts_in_kernel") is None
    vary = "train.native_kernels=none,experts"
    config = ROOT / "configs" / "debug" / "digits_sparse_v1.yaml"
    _, said, _ = swinmoe("profile", "model", config, "--vary", vary, "--rounds", "1", "--inference")
    plain = "experts by torch's operators, not our kernel (train.native_kernels=none): "
    told = [line for line in said.splitlines() if line.startswith("experts by")]
    assert [line for line in told if line.startswith(plain) and line.endswith("native_kernels none")]
    assert [line for line in told if line.startswith(f"experts by {how}: ") and line.endswith("native_kernels experts")]
    assert "  range  " in said and "95 %" not in said


def test_options_lie_on_top_of_a_file(swinmoe: Command, tmp_path: Path) -> None:
    file = ROOT / "configs" / "profile" / "debug_layer.yaml"
    status, _, said = swinmoe(
        "profile", "layer", file, *SMALL, "--dispatcher", "padded", "--inference", "--out", tmp_path
    )
    assert status == 0, said
    lines = read_records(tmp_path / "records.jsonl")[1:]
    assert [line["variant"]["capacity"] for line in lines[1:]] == ["dropless", "fixed 1.25"]
    assert {line["variant"]["tokens"] for line in lines} == {32}
    assert all(set(line["phases"]) == {"forward"} for line in lines[1:])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("layer", "--experts", "2", "--top-k", "3"), "moe.top_k=3 is not possible"),
        (("layer", "--ep-size", "2"), "parallel.ep_size=2 does not divide the number of processes 1"),
        (("layer", "--dispatcher", "fast"), "moe.dispatcher='fast' is unknown"),
        (("layer", "configs/profile/debug_model.yaml"), "is for swinmoe profile model, not layer"),
        (("model", "configs/profile/debug_layer.yaml"), "is for swinmoe profile layer, not model"),
        (("model", "configs/debug/digits_swin_moe.yaml", "--vary", "seed"), "is not of the form key=a,b"),
        (
            ("model", "configs/debug/digits_swin_moe.yaml", "--vary", "model.grad_checkpointing=[0,1],[0"),
            "'[0,1],[0' is no list of values with commas between",
        ),
        (("model", "configs/debug/digits_swin_moe.yaml", "model.depth=3"), "unknown config key"),
        (("model", "configs/debug/digits_swin_moe.yaml", "train.precision=fp16"), "needs a GPU"),
    ],
)
def test_errors_help(swinmoe: Command, argv: tuple[str, ...], message: str) -> None:
    status, _, said = swinmoe("profile", *argv)
    assert status == 2 and message in " ".join(said.split())


def test_training_steps_can_be_traced(swinmoe: Command, tmp_path: Path) -> None:
    config = "configs/debug/digits_swin_moe.yaml"
    settings: tuple[str, ...] = ("train.steps=3", "train.batch_size=8", "data.limit=16", "log.peak_flops=1e11")
    settings = (*settings, "schedule.warmup_steps=1", f"output_dir={tmp_path}")
    status, _, said = swinmoe("train", config, *settings, "--trace", "2:3")
    path = tmp_path / "debug_digits_swin_moe" / "trace-2-3.json"
    assert status == 0 and f"trace: {path}" in said, said
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert {"step 2", "step 3"} == {event["name"] for event in events if event["name"].startswith("step ")}
    passes = {event["args"]["pass"] for event in events if event.get("cat") == "phases"}
    assert passes == {"forward", "backward", "update"}
    status, _, said = swinmoe("train", config, "--trace", "late")
    assert status == 2 and "names no steps" in said
