"""Calibration: constants come back from times that they made, and a machine's own figures make a description."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swinmoe.errors import ConfigError
from swinmoe.profiling.plan import calibrate as module
from swinmoe.profiling.plan.calibrate import calibrate
from swinmoe.profiling.plan.hardware import load_hardware


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work of milliseconds."""
    monkeypatch.setattr(module, "SHAPES", ((64, 64, 64), (128, 32, 64), (32, 128, 16)))
    monkeypatch.setattr(module, "WINDOWS", ((4, 16, 8),))
    monkeypatch.setattr(module, "ROWS", 64)
    monkeypatch.setattr(module, "DIM", 32)
    monkeypatch.setattr(module, "SIZES", (2**8, 2**12))


def test_constants_come_back_from_the_times_they_made() -> None:
    benches = [*module._products("fp32", torch.device("cpu"))]
    flops, traffic, call = 1e11, 1e10, 2e-5
    times = {b.name: b.cost.flops / flops + b.cost.products / traffic + b.cost.calls * call for b in benches}
    *found, error = module._fit(benches, times)
    assert found == pytest.approx([flops, traffic, call], rel=1e-6) and error < 1e-6


def test_a_machine_describes_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small(monkeypatch)
    found = calibrate(torch.device("cpu"), rounds=3)
    file = tmp_path / "mine.yaml"
    file.write_text(found.as_yaml(), encoding="utf-8")
    assert load_hardware(str(file)) == found
    assert found.device == "cpu" and found.processes_per_node == 1 and found.sharing == ()
    assert found.flops_per_second("fp32") > 0 and "plan --calibrate" in found.rates.copy.source


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(ConfigError, match="--rounds 2: medians need at least 3"):
        calibrate(torch.device("cpu"), rounds=2)
