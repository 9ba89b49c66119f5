"""The token-by-token oracle of tests/numerics, loaded by path: test folders are no packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def loop_moe() -> Any:
    path = Path(__file__).parents[2] / "numerics" / "moe_oracle.py"
    spec = importlib.util.spec_from_file_location("token_by_token", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.loop_moe
