"""Listening to what is sent."""

from __future__ import annotations

from swinmoe.comm import listen
from swinmoe.comm.traffic import note


def test_listeners_within_listeners_hear_each_their_own() -> None:
    with listen() as outer:
        with listen() as inner:
            note("all_to_all", "first", 2, 8)
        note("all_gather", "second", 2, 4)
    note("all_gather", "nobody listens", 2, 4)
    assert [m.what for m in inner] == ["first"]
    assert [m.what for m in outer] == ["first", "second"]
