"""The files that `write_report` leaves: whole, self-contained, safe, and there for every kind of run."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from report_records import write_records

from swinmoe.errors import CheckpointError
from swinmoe.records import RunRecord
from swinmoe.report import ReportPaths, write_report
from swinmoe.report import page as page_module
from swinmoe.report import render as render_module

VOID = {"meta", "img", "br", "source", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what the page refers to and says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(paths: ReportPaths) -> Page:
    return Page(paths.html.read_text())


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of words: every figure is an empty file, since drawing takes most of a report's time."""
    monkeypatch.setattr(render_module, "drawn", lambda make, theme: b"")


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> ReportPaths:
    folder = tmp_path_factory.mktemp("twins")
    records = write_records(folder / "records.jsonl", seeds=(0, 1, 2), steps=80)
    return write_report(records, folder)


def test_everything_is_there(twins: ReportPaths) -> None:
    assert [p.name for p in twins.figures] == [
        "loss.png",
        "accuracy.png",
        "test_loss.png",
        "load_sparse.png",
        "routing_sparse.png",
        "patches_sparse.png",
        "classes_sparse.png",
    ]
    for path in twins.figures:
        with Image.open(path) as image:
            image.verify()
    markdown = twins.markdown.read_text()
    for path in twins.figures:
        assert f"({path.relative_to(twins.markdown.parent)})" in markdown
    assert list(twins.html.parent.rglob(".*")) == []  # no temporary files left


def test_html_is_self_contained_and_well_formed(twins: ReportPaths) -> None:
    text = twins.html.read_text()
    assert "http://" not in text and "https://" not in text and "url(" not in text
    page = Page(text)
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.tags.count("img") == len(twins.figures)
    assert "prefers-color-scheme: dark" in text


def test_the_page_tells_the_result_and_how_it_came_about(twins: ReportPaths) -> None:
    text = page_of(twins).text
    assert twins.headline.startswith("At equal training FLOPs, sparse holds 4.12× the parameters of dense")
    assert twins.headline.split(". ")[0] in text
    for needed in ("5.31 M", "12.4 M", "8 experts, top 1", "fashion_mnist", "06e9f82", "2.14.1", "embed_dim: 48"):
        assert needed in text
    assert "class information" not in text  # it is inside the picture; the words beside it explain it
    assert "Class information" in text
    markdown = twins.markdown.read_text()
    assert "| sparse − dense | 0, 1, 2 |" in markdown
    assert "```yaml" in markdown


def test_names_are_escaped(tmp_path: Path, undrawn: None) -> None:
    evil = "sparse<script>alert(1)</script>|`$x$`/.."
    records = write_records(tmp_path / "records.jsonl", ("dense", evil), (0,), steps=16, pictures=False)
    paths = write_report(records, tmp_path)
    page = page_of(paths)
    assert "script" not in page.tags
    assert evil in page.text
    markdown = paths.markdown.read_text()
    assert "<script>" not in markdown.split("```")[0]
    assert all(p.parent == tmp_path / "figures" and p.is_file() for p in paths.figures)


def test_an_unfinished_run_says_so(tmp_path: Path, undrawn: None) -> None:
    records = write_records(tmp_path / "records.jsonl", seeds=(0,), steps=40, stop_at=20)
    with records.open("a") as file:
        file.write('{"kind":"step","arm":"den')  # being written at this moment
    paths = write_report(records, tmp_path)
    assert paths.headline.startswith("Unfinished: 0 of 2 runs are done; still to go: dense seed 0 (step 20 of 40)")
    assert "unfinished" in page_of(paths).text
    assert "state: unfinished" in paths.markdown.read_text()
    assert "patches_sparse.png" not in {p.name for p in paths.figures}


def test_one_arm_alone(tmp_path: Path) -> None:
    paths = write_report(write_records(tmp_path / "records.jsonl", ("sparse",), (0,), steps=16), tmp_path)
    assert "There is no second arm" in paths.headline
    page = page_of(paths)
    assert "Paired differences" not in page.text
    assert "single seed" in page.text


def test_dense_arms_have_no_routing_section(tmp_path: Path, undrawn: None) -> None:
    records = write_records(tmp_path / "records.jsonl", ("dense", "wide"), (0, 1), steps=16)
    paths = write_report(records, tmp_path)
    assert {p.name for p in paths.figures} == {"loss.png", "accuracy.png", "test_loss.png"}
    assert "What the experts" not in page_of(paths).text


def test_hardly_anything_recorded(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "records.jsonl")
    record.write("run", command="train", name="just begun", config={}, environment=None, time=None)
    paths = write_report(tmp_path / "records.jsonl", tmp_path)
    assert paths.figures == () and "No arm has written" in page_of(paths).text
    record.write("arm", arm="a", seed=0)
    record.write("step", arm="a", seed=0, step=1, loss=float("nan"), routing={"mlp": {"routed": [1, 2]}})
    paths = write_report(tmp_path / "records.jsonl", tmp_path)
    assert [p.name for p in paths.figures] == ["load_a.png"]
    assert "has logged no step yet" in paths.headline


def test_figures_of_arms_with_clashing_names_do_not_overwrite_each_other(tmp_path: Path, undrawn: None) -> None:
    record = RunRecord(tmp_path / "records.jsonl")
    for arm in ("s 1", "s/1"):
        record.write("step", arm=arm, seed=0, step=1, loss=None, routing={"mlp": {"kept": [1, 2]}})
    paths = write_report(tmp_path / "records.jsonl", tmp_path)
    assert [p.name for p in paths.figures] == ["load_s-1.png", "load_s-1-2.png"]


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(page_module.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        page_module.write_whole(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_records_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no records at"):
        write_report(tmp_path / "records.jsonl", tmp_path)
    (tmp_path / "records.jsonl").write_text(json.dumps({"kind": "note"}) + "\nbroken\n")
    with pytest.raises(CheckpointError, match="line 2"):
        write_report(tmp_path / "records.jsonl", tmp_path)
