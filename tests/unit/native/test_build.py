"""Kernels are compiled once, whole or not at all, and what cannot be is told."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from swinmoe.errors import BackendUnavailableError
from swinmoe.native import build


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, and nothing remembered from before or kept for after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for function in (build.kernels, build._folder):
        function.cache_clear()
    yield
    for function in (build.kernels, build._folder):
        function.cache_clear()


def compiler_that(tmp_path: Path, does: str) -> str:
    """A stand-in for a compiler; `$out` is what it is to make."""
    path = tmp_path / "compiler"
    lines = ["#!/bin/sh", f"echo called >> {tmp_path}/calls", 'case "$1" in --version) echo 1; exit;; esac']
    path.write_text("\n".join([*lines, 'for out in "$@"; do :; done', does, ""]))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_compiles_once_and_finds_it_again(tmp_path: Path) -> None:
    try:
        first = build.kernels()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    (made,) = (tmp_path / "cache" / "swinmoe").iterdir()
    before = made.stat().st_mtime_ns
    build.kernels.cache_clear()
    assert build.kernels()._name == first._name == str(made)
    assert made.stat().st_mtime_ns == before


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendUnavailableError, match=r"CXX names 'no-such-compiler', which is not installed"):
        build.kernels()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler_that(tmp_path, 'echo partial > "$out"; echo "no such option" >&2; exit 1'))
    with pytest.raises(BackendUnavailableError, match=r"does not compile our kernels: no such option"):
        build.kernels()
    assert list((tmp_path / "cache" / "swinmoe").iterdir()) == []


def test_what_does_not_load_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler_that(tmp_path, 'echo "no library" > "$out"'))
    with pytest.raises(BackendUnavailableError, match=r"kernels-[0-9a-f]{16}\.so does not load.*delete it"):
        build.kernels()


@pytest.mark.parametrize("does", ["exit 0", "kill -9 $$"])
def test_a_compiler_that_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    monkeypatch.setenv("CXX", compiler_that(tmp_path, does))
    with pytest.raises(BackendUnavailableError, match="does not compile our kernels"):
        build.kernels()


def test_what_is_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compiler_that(tmp_path, "")
    Path(path).write_bytes(b"\x00\x01")
    monkeypatch.setenv("CXX", path)
    with pytest.raises(BackendUnavailableError, match="does not compile our kernels"):
        build.kernels()


def test_another_compiler_makes_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for version in ("a", "b"):
        path = compiler_that(tmp_path, "exit 1")
        Path(path).write_text(Path(path).read_text().replace("echo 1;", f"echo {version};"))
        names.add(build._key(path))
    assert len(names) == 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = build._folder()
    assert folder.is_dir() and tmp_path not in folder.parents


def test_a_cache_that_others_may_write_to_is_not_trusted(tmp_path: Path) -> None:
    """What lies there would be run."""
    cache = tmp_path / "cache" / "swinmoe"
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert build._folder() != cache
    build._folder.cache_clear()
    cache.chmod(0o700)
    assert build._folder() == cache


def test_nobody_knows_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    assert build._folder().is_dir()
