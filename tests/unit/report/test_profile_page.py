"""The page of a profile: numbers by their definitions, nothing empty, nothing of a name taken for HTML."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swinmoe.cli import main
from swinmoe.errors import CheckpointError
from swinmoe.records import RunRecord
from swinmoe.report import profile_page, write_profile_report
from swinmoe.report import profile_plots as plots
from swinmoe.report.profile_data import Measured, grouped, read_profiles
from swinmoe.report.theme import LIGHT, styled

HOSTILE = "<script>alert('$x_1$ & \"y\"')</script>"
SIZES = [4096, 65536, 2**20]


class Page(HTMLParser):
    """Tags that nest, headings, words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in {"meta", "img", "br", "source"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        self.text += data


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of words: drawing takes most of a page's time."""
    monkeypatch.setattr(profile_page, "drawn", lambda make, theme: b"")


def dense(name: str = "dense T64", ms: float = 10.0, world: int = 1) -> dict[str, Any]:
    return {
        "what": "layer",
        "name": name,
        "variant": {"dispatcher": "dense", "num_experts": 0, "top_k": 1, "world": world, "ep_size": 1, "tokens": 64},
        "baseline": None,
        "ms": {"median": ms, "low": 0.9 * ms, "high": 1.1 * ms, "rounds": 15},
        "flops": {"model": 1000, "hardware": 1000, "dense_equivalent": 1000},
        "gemm_flops_per_second": 2e11,
        "utilisation": {"model": 0.8, "hardware": 0.8},
        "memory": {"dense": 2**20, "experts": 0, "optimizer": 0, "dispatch": 0, "activations": 2**20, "peak": 2**21},
    }


def sparse(
    name: str, ms: float = 15.0, capacity: str = "fixed 1.25", world: int = 1, skew: Any = "router"
) -> dict[str, Any]:
    spread = world > 1
    return dense() | {
        "name": name,
        "variant": {
            "dispatcher": "padded",
            "num_experts": 8,
            "top_k": 1,
            "capacity": capacity,
            "world": world,
            "ep_size": world,
            "tokens": 64,
            "skew": skew,
        },
        "baseline": "dense T64",
        "ms": {"median": ms, "low": ms - 1, "high": ms + 1, "rounds": 15},
        "phases": {
            "forward": {"route": 1.0, "experts": 3.0, "exchange_out": 1.0 * spread, "other": 1.0},
            "backward": {"experts": 8.0, "other": 2.0},
        },
        "instrumented_ms": 15.3,
        "exposed_ms": 3.0 if spread else None,
        "hidden_ms": 1.0 if spread else None,
        "exchange_ms": 4.0 if spread else None,
        "balanced_ms": 12.0,
        "rows": {"routed": 100, "kept": 80, "computed": 160},
        "bytes_sent": 1e6 * spread,
        "bandwidth": 2.5e8 if spread else None,
        "exchange_bytes": 9e5 if spread else None,
        "ranks": world,
    }


def exchange(size: int, direction: str, skew: float = 0.0, ranks: int = 2) -> dict[str, Any]:
    seconds = 1e-4 + size * (ranks - 1) / 1e9
    name = f"flat {size}, skew {skew}, {direction}"
    return {
        "what": "exchange",
        "name": name,
        "variant": {
            "bytes": size,
            "skew": skew,
            "exchange": "flat",
            "local_size": None,
            "chunks": 1,
            "payload": "full",
            "ep_size": ranks,
            "world": ranks,
            "direction": direction,
        },
        "baseline": None,
        "ms": {"median": 1000 * seconds, "low": 900 * seconds, "high": 1200 * seconds, "rounds": 15},
        "message_bytes": float(size),
        "bytes_sent": float(size),
        "busiest_bytes": float(size),
        "algbw": size * ranks / seconds,
        "busbw": size * (ranks - 1) / seconds,
        "ranks": ranks,
    }


def fit(direction: str, ranks: int | None = 2) -> dict[str, Any]:
    points = [
        {"name": "", "message_bytes": s, "ranks": 2, "seconds": 1e-4 + s / 1e9, "predicted": 1e-4 + s / 1e9, "error": 0}
        for s in SIZES
    ]
    return {
        "what": "exchange",
        "name": f"flat, {ranks} ranks, {direction}",
        "variant": {
            "exchange": "flat",
            "local_size": None,
            "chunks": 1,
            "payload": "full",
            "direction": direction,
            "ep_size": ranks,
            "world": 2,
        },
        "latency_seconds": 1e-4,
        "bandwidth": 1e9,
        "half_message": 0.0,
        "half_bandwidth_bytes": 1e5,
        "latency_error": 0.02,
        "bandwidth_error": 0.03,
        "typical_error": 0.04,
        "worst_error": 0.11,
        "points": points,
    }


def write(folder: Path, what: str, lines: list[dict[str, Any]], fits: list[dict[str, Any]] | None = None) -> Path:
    path = folder / "records.jsonl"
    record = RunRecord(path)
    record.write(
        "profile",
        what=what,
        command=f"swinmoe profile {what}",
        workload={"tokens": 64, "capacity": ["dropless"]},
        environment={"torch": "2.14", "world_size": 1, "device": "cpu"},
        time="2026-11-22T10:00:00",
    )
    for line in lines:
        record.write("measurement", **line)
    for line in fits or []:
        record.write("fit", **line)
    return path


def test_everything_measured_has_its_section_and_pictures(tmp_path: Path) -> None:
    layer = [dense(), *(sparse(c, capacity=c) for c in ("fixed 1", "fixed 2", "dropless"))]
    exchanges = [exchange(s, d, skew) for d in ("forward", "backward") for s in SIZES for skew in (0.0, 0.9)]
    one = write(tmp_path / "one", "layer", layer)
    two = write(tmp_path / "two", "layer", [dense(world=2), sparse("fixed 1", capacity="fixed 1", world=2)])
    three = write(tmp_path / "three", "exchange", exchanges, [fit("forward"), fit("backward"), fit("forward", None)])
    report = write_profile_report([one, two, three], tmp_path / "page")
    text = report.html.read_text()
    page = Page(text)
    assert page.headings == [
        "Steps in numbers",
        "Where the time goes",
        "Throughput against capacity",
        "Exposed and hidden communication",
        "What is paid for nothing",
        "FLOPs and utilisation",
        "Memory by class",
        "Scaling over processes",
        "Exchanges by themselves",
        "What exactly was run",
    ]
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in page.sources)
    # phases both ways, capacity, communication, memory, scaling, bandwidth both ways, skew
    assert page.tags.count("img") == 9
    assert not re.search(r"https?://|@import|<script|<link", text)
    assert "250 MB/s" in page.text and "900 kB, 2 ranks" in page.text
    assert [p.name for p in (tmp_path / "page").iterdir()] == ["report.html"]


def test_what_was_not_measured_is_left_out(tmp_path: Path, undrawn: None) -> None:
    bare = {"what": "layer", "name": "a", "variant": {}, "baseline": None, "ms": {"median": 1.0}}
    page = Page(write_profile_report([write(tmp_path, "layer", [bare])], tmp_path).html.read_text())
    assert page.headings == ["Steps in numbers", "What exactly was run"]
    only = [exchange(4096, "forward")]
    page = Page(write_profile_report([write(tmp_path / "e", "exchange", only)], tmp_path).html.read_text())
    assert page.headings == ["Exchanges by themselves", "What exactly was run"] and "img" not in page.tags
    page = Page(write_profile_report([write(tmp_path / "n", "layer", [])], tmp_path).html.read_text())
    assert page.headings == ["What exactly was run"] and "Nothing has been measured yet." in page.text


def test_a_run_that_is_cut_off_still_has_a_page(tmp_path: Path, undrawn: None) -> None:
    """A baseline that is not there, a line half written, a number that was not finite."""
    path = write(tmp_path, "layer", [sparse("a") | {"bandwidth": math.inf}])
    with path.open("a") as file:
        file.write('{"kind": "measurement", "what"')
    found = read_profiles([path])
    assert [m.ratio for m in found.measured] == [None]
    assert "Steps in numbers" in Page(write_profile_report([path], tmp_path).html.read_text()).headings


@pytest.mark.parametrize("drawn", [True, False])
def test_names_are_words(tmp_path: Path, drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not drawn:
        monkeypatch.setattr(profile_page, "drawn", lambda make, theme: b"")
    lines = [dense(HOSTILE), sparse(f"{HOSTILE} 2") | {"baseline": HOSTILE}]
    path = write(tmp_path / "a<b>&", "layer", lines)
    text = write_profile_report([path], tmp_path).html.read_text()
    page = Page(text)
    assert "script" not in page.tags and HOSTILE in page.text and "a<b>&" in page.text


def test_definitions(tmp_path: Path) -> None:
    """By hand, from the numbers written above."""
    base, one = read_profiles([write(tmp_path, "layer", [dense(), sparse("one", world=2)])]).measured
    assert one.baseline is base and one.ratio == pytest.approx(1.5) and one.told_apart
    assert one.drop_loss == pytest.approx(0.2)
    assert one.padding_waste == pytest.approx(0.5)
    assert one.imbalance_tax == pytest.approx(0.25)
    assert one.exposed_share == pytest.approx(3.0 / 15.3)
    assert one.phase_gap == pytest.approx(0.02)
    assert one.rate == pytest.approx(2 * 64 / 0.015)
    assert (base.drop_loss, base.padding_waste, base.imbalance_tax, base.exposed) == (None, None, None, None)


@pytest.mark.parametrize(("rounds", "said"), [(15, "95 %, 15 rounds"), (6, "95 %, 6 rounds"), (5, "range, 5 rounds")])
def test_few_rounds_have_a_range_and_no_interval(rounds: int, said: str, tmp_path: Path, undrawn: None) -> None:
    layer, sent = dense(), exchange(4096, "forward")
    for line in (layer, sent):
        line["ms"]["rounds"] = rounds
    for what, line in (("layer", layer), ("exchange", sent)):
        text = Page(write_profile_report([write(tmp_path / what, what, [line])], tmp_path).html.read_text()).text
        assert text.count(said) == 1 and "95 % interval" not in text.replace("with a 95 % interval", "")


def test_a_page_says_who_computed_the_experts(tmp_path: Path, undrawn: None) -> None:
    taken = {"experts_in_kernel": True, "experts_in_kernel_reason": None}
    left = {"experts_in_kernel": False, "experts_in_kernel_reason": "<none>"}
    text = Page(
        write_profile_report(
            [write(tmp_path / "a", "layer", [dense(), sparse("a") | taken])], tmp_path
        ).html.read_text()
    ).text
    assert "by our kernel in C++" in text and "torch's operators" not in text
    lines = [dense(), sparse("a") | taken, sparse("b") | left]
    text = Page(write_profile_report([write(tmp_path / "b", "layer", lines)], tmp_path).html.read_text()).text
    assert "by our kernel in C++: a" in text and "by torch's operators, not our kernel (<none>): b" in text


@pytest.mark.parametrize(("ms", "apart"), [(11.5, False), (12.05, True), (9.0, False), (7.9, True)])
def test_overlapping_intervals_are_noise(ms: float, apart: bool, tmp_path: Path, undrawn: None) -> None:
    """The baseline's is [9, 11], this one's ms ± 1."""
    path = write(tmp_path, "layer", [dense(), sparse("one", ms)])
    (_, one) = read_profiles([path]).measured
    assert one.told_apart is apart
    text = write_profile_report([path], tmp_path).html.read_text()
    assert ('<span class="pill noise">' in text) is not apart


def test_baselines_are_those_of_the_same_profile(tmp_path: Path) -> None:
    """Names repeat between folders, and folders' names do too."""
    paths = [
        write(tmp_path / part / "same", "layer", [dense(ms=ms), sparse("one")])
        for part, ms in (("a", 10.0), ("b", 30.0))
    ]
    found = read_profiles(paths)
    assert [m.ratio for m in found.measured if m.ratio] == pytest.approx([1.5, 0.5])
    assert [m.label for m in found.measured[1::2]] == ["one · same", "one · same 2"]


def test_series_over_processes_join_what_differs_in_processes_alone(tmp_path: Path) -> None:
    names = ("fixed 1", "fixed 2")
    one = write(tmp_path / "one", "layer", [dense(), *(sparse(c, 20.0, c) for c in names)])
    two = write(tmp_path / "two", "layer", [dense(world=2), *(sparse(c, 25.0, c, world=2) for c in names)])
    series = plots.scaling_series(read_profiles([one, two]).measured)
    assert len(series) == 3 and all([m.world for m in own] == [1, 2] for own in series.values())
    sparse_own = [own for own in series.values() if not own[0].is_dense]
    assert all(own[0].variant["capacity"] == own[1].variant["capacity"] for own in sparse_own)
    rows = profile_page._efficiency(sparse_own[0])
    assert [(world, efficiency) for world, _, efficiency in rows] == [(1, 1.0), (2, pytest.approx(0.8))]


def test_groups_never_merge_what_differs() -> None:
    """A key that some lack separates them too, and says so only where it must."""
    variants: list[dict[str, Any]] = [
        {"exchange": "flat", "local_size": None},
        {"exchange": "2dh", "local_size": 2},
        {"exchange": "2dh", "local_size": None},
    ]
    lines = [Measured({"what": "exchange", "variant": v, "ms": {"median": 1.0}}, 0, "") for v in variants]
    assert list(grouped(lines[:2], ())) == ["flat", "2dh"]
    assert list(grouped(lines, ())) == ["flat", "2dh, nodes of 2", "2dh"]


def test_a_setting_of_a_run_says_its_name() -> None:
    """What a sweep varies comes under its key; of a bare `True` nobody would know what it is of."""
    variants = [{"num_experts": 4, "model.grad_checkpointing": on, "train.batch": 8} for on in (False, True)]
    lines = [Measured({"what": "model", "variant": v, "ms": {"median": 1.0}}, 0, "") for v in variants]
    assert list(grouped(lines, ())) == ["grad_checkpointing False", "grad_checkpointing True"]


def test_the_drawn_fit_is_the_formula(tmp_path: Path) -> None:
    sizes = np.geomspace(SIZES[0], SIZES[-1], 50)
    assert plots.predicted_seconds(fit("forward"), sizes) == pytest.approx(1e-4 + sizes / 1e9)
    found = read_profiles([write(tmp_path, "exchange", [exchange(s, "forward") for s in SIZES], [fit("forward")])])
    with styled(LIGHT):
        axes = plots.bandwidth_figure(found.measured, found.fits, LIGHT).axes[0]
    line = max((one.get_xydata() for one in axes.lines), key=len)
    assert line[:, 1] == pytest.approx(sizes[[0]] * 0 + line[:, 0] / (1e-4 + line[:, 0] / 1e9) / 1e9)
    assert plots.fit_of(found.measured[0], [fit("backward") | {"source": 0}, fit("forward") | {"source": 1}]) is None


def test_bars_are_as_long_as_their_phases() -> None:
    one = Measured(sparse("one", world=2), 0, "one")
    with styled(LIGHT):
        axes = plots.phases_figure([one], "forward", 20.0, LIGHT).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [1.0, 1.0, 3.0, 1.0]
    assert [bar.get_x() for bar in axes.patches] == [0.0, 1.0, 2.0, 5.0]
    assert axes.get_xlim()[1] >= 20


def test_the_command_takes_one_folder_or_several_profiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*argv: str) -> int:
        monkeypatch.setattr("sys.argv", ["swinmoe", "report", *argv])
        with pytest.raises(SystemExit) as done:
            main()
        return int(done.value.code or 0)

    for name in ("a", "b"):
        write(tmp_path / name, "layer", [dense(), sparse("one")])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "records.jsonl").write_text(json.dumps({"kind": "note", "text": "x"}) + "\n")
    assert run(str(tmp_path / "a")) == 0 and (tmp_path / "a" / "report.html").is_file()
    assert run(str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")) == 0
    assert "one · b" in (tmp_path / "c" / "report.html").read_text() and not (tmp_path / "b" / "report.html").exists()
    assert run(str(tmp_path / "run"), str(tmp_path / "a")) == 2
    assert "give it alone" in capsys.readouterr().err


def test_no_records_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no records at"):
        write_profile_report([tmp_path / "records.jsonl"], tmp_path)
