"""Traces load as JSON, hold phases on torch's own time base, and name no machine."""

from __future__ import annotations

import json
import socket
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from swinmoe.commands.train import parse_steps
from swinmoe.config import MoEConfig
from swinmoe.errors import ConfigError
from swinmoe.moe import MoEMlp, phases
from swinmoe.profiling.trace import StepTracer, of_rank, trace_steps


def step() -> None:
    layer = MoEMlp(MoEConfig(num_experts=4), dim=8, hidden_dim=16)
    y, stats = layer(torch.randn(30, 8, requires_grad=True))
    phases.turn(phases.BACKWARD)
    torch.autograd.backward([y.sum(), stats.loss])


def events(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert socket.gethostname() not in text and str(path) not in text
    found: list[dict[str, Any]] = json.loads(text)["traceEvents"]
    return [event for event in found if event["ph"] == "X"]


def test_phases_lie_over_the_operators_that_belong_to_them(tmp_path: Path) -> None:
    trace_steps(tmp_path / "t" / "trace.json", {"a step": step, "another": step}, "cpu")
    found = events(tmp_path / "t" / "trace.json")
    named = {event["name"]: event for event in found}
    assert {"a step", "another"} <= set(named)
    track = [event for event in found if event.get("cat") == "phases"]
    assert {event["name"] for event in track} == {*phases.LAYER_PHASES, "other"}
    assert {event["args"]["pass"] for event in track} == {"forward", "backward"}
    # End to end, and the router's softmax inside `route`.
    for one, following in pairwise(track):
        assert following["ts"] == pytest.approx(one["ts"] + one["dur"], abs=0.01)
    softmax = next(event for event in found if event["name"] == "aten::_softmax")
    around = [e["name"] for e in track if e["ts"] <= softmax["ts"] + 50 and softmax["ts"] <= e["ts"] + e["dur"] + 50]
    assert "route" in around


def test_some_steps_of_a_run_are_traced(tmp_path: Path) -> None:
    tracer = StepTracer(2, 3, tmp_path / "trace.json")
    for number in range(1, 6):
        with tracer(number):
            step()
    tracer.close()
    assert tracer.written == tmp_path / "trace.json"
    names = {event["name"] for event in events(tmp_path / "trace.json")}
    assert {name for name in names if name.startswith("step ")} == {"step 2", "step 3"}
    assert not phases.listening()


def test_a_run_that_ends_early_leaves_its_trace(tmp_path: Path) -> None:
    tracer = StepTracer(2, 9, tmp_path / "trace.json")
    for number in range(1, 4):
        with tracer(number):
            step()
    tracer.close()
    assert "step 3" in {event["name"] for event in events(tmp_path / "trace.json")}
    unused = StepTracer(7, 9, tmp_path / "none.json")
    with unused(1):
        step()
    unused.close()
    assert unused.written is None and not (tmp_path / "none.json").exists()


def test_each_rank_has_its_file() -> None:
    assert of_rank(Path("a/trace.json"), 1, 2) == Path("a/trace.rank1.json")
    assert of_rank(Path("a/trace.json"), 0, 1) == Path("a/trace.json")


def test_steps_are_named_from_1() -> None:
    assert parse_steps("10:13") == (10, 13) and parse_steps("4") == (4, 4)
    for wrong in ("", "0", "3:2", "a:b", "1:", ":3", "1:2:3", "-1"):
        if wrong == "1:":
            assert parse_steps(wrong) == (1, 1)
            continue
        with pytest.raises(ConfigError, match="names no steps"):
            parse_steps(wrong)
