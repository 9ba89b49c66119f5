"""Run records: append-only, repaired after a kill, superseded lines withdrawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from swinmoe.errors import CheckpointError
from swinmoe.records import RunRecord, read_records


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "deep" / "records.jsonl")
    record.write("run", name="x")
    record.write("step", arm="a", seed=0, step=1, loss=float("nan"), routing={"l": {"load": (1, float("inf"))}})
    first, second = read_records(tmp_path / "deep" / "records.jsonl")
    assert first == {"kind": "run", "name": "x"}
    assert second["loss"] is None and second["routing"] == {"l": {"load": [1, None]}}


def test_half_a_line_is_ignored_and_then_cut(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    RunRecord(path).write("note", text="whole")
    with path.open("a") as file:
        file.write('{"kind":"note","te')
    assert [line["text"] for line in read_records(path)] == ["whole"]
    RunRecord(path).write("note", text="after")
    assert [line["text"] for line in read_records(path)] == ["whole", "after"]


def test_superseded_withdraws_only_its_own_later_lines(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "records.jsonl")
    for arm, seed, step in [("a", 0, 1), ("a", 0, 2), ("b", 0, 2), ("a", 1, 2)]:
        record.write("step", arm=arm, seed=seed, step=step)
    record.write("superseded", arm="a", seed=0, after_step=1)
    record.write("step", arm="a", seed=0, step=2, again=True)
    lines = read_records(tmp_path / "records.jsonl")
    assert [(x["arm"], x["seed"], x["step"], x.get("again")) for x in lines] == [
        ("a", 0, 1, None), ("b", 0, 2, None), ("a", 1, 2, None), ("a", 0, 2, True)]  # fmt: skip


def test_errors_name_the_culprit(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no records at .*records\.jsonl"):
        read_records(tmp_path / "records.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"kind":"note"}\nnot json\n')
    with pytest.raises(CheckpointError, match="line 2"):
        read_records(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="not one of"):
        RunRecord(tmp_path / "x.jsonl").write("stpe")


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    RunRecord(None).write("note", text="x")
    assert list(tmp_path.iterdir()) == []
