"""Of a failing job's ranks, the right one speaks: rules by hand, and two processes that meet to settle it."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from swinmoe.runtime.last_words import Word, choose, last_word
from swinmoe.runtime.processes import ranks_named

CAUSE, OTHER = Word("a bug", False), Word("another bug", False)
WAITED = Word("the gather did not finish", True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([CAUSE, CAUSE, CAUSE], {0: "a bug"}),
        ([None, CAUSE, CAUSE], {1: "ranks 1, 2: a bug"}),
        ([WAITED, WAITED, CAUSE], {2: "rank 2: a bug"}),
        ([CAUSE, OTHER, WAITED], {0: "rank 0: a bug", 1: "rank 1: another bug"}),
        (
            [None, WAITED, WAITED],
            {1: "the gather did not finish. No word came from rank 0: it was killed, or hangs"},
        ),
        (
            [WAITED, None, None],
            {0: "the gather did not finish. No word came from ranks 1, 2: they were killed, or hang"},
        ),
        ([WAITED, WAITED, WAITED], {0: "the gather did not finish"}),
    ],
    ids=["all alike", "some alike", "a cause", "two causes", "one silent", "two silent", "consequences alone"],
)
def test_who_says_what(words: list[Word | None], said: dict[int, str]) -> None:
    known = {rank: word for rank, word in enumerate(words) if word is not None}
    heard = {rank: choose(known, rank, len(words)) for rank in known}
    assert {rank: text for rank, text in heard.items() if text is not None} == said


@pytest.mark.parametrize(
    ("ranks", "name"), [([3], "rank 3"), ([0, 1], "ranks 0, 1"), ([0, 1, 2, 5, 7, 8, 9], "ranks 0-2, 5, 7-9")]
)
def test_ranks_are_named_in_runs(ranks: list[int], name: str) -> None:
    assert ranks_named(ranks) == name


def test_alone_or_interrupted_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert last_word("a bug", consequence=False) == "a bug"
    for rank, said in (("0", "interrupted"), ("1", None)):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        assert last_word("interrupted", consequence=False, interrupted=True) == said


def test_without_a_meeting_point_each_speaks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert last_word("incomplete", consequence=False) == "incomplete"


def test_processes_that_fail_meet_although_they_never_joined() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    code = (
        "import sys; from swinmoe.runtime import last_word; print(last_word(sys.argv[1], consequence=False, grace=60))"
    )
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, message], env=job | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank, message in enumerate(["no such file", "no such file"])
    ]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["no such file\n", "None\n"]
