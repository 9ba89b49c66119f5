"""Configs by name where there is no clone around."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from swinmoe.config import io
from swinmoe.config.io import read_yaml, run_config
from swinmoe.errors import ConfigError


def test_configs_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = run_config("configs/debug/digits_sparse_v2.yaml")
    assert named == run_config("debug/digits_sparse_v2.yaml") and named.name == "debug_digits_sparse_v2"
    with pytest.raises(ConfigError, match="does not exist"):
        run_config("configs/debug/none.yaml")
    (tmp_path / "configs" / "debug").mkdir(parents=True)
    (tmp_path / "configs" / "debug" / "digits_sparse_v2.yaml").write_text("name: mine")
    assert read_yaml("configs/debug/digits_sparse_v2.yaml") == {"name": "mine"}  # what is here comes first


def test_in_a_wheel_they_are_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "swinmoe"
    shutil.copytree(Path(io.__file__).parents[2] / "configs" / "debug", package / "_configs" / "debug")
    monkeypatch.setattr(io, "__file__", str(package / "config" / "io.py"))
    monkeypatch.chdir(tmp_path)
    assert read_yaml("configs/debug/digits_sparse_v2.yaml")["name"] == "debug_digits_sparse_v2"
