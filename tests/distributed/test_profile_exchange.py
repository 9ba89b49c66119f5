"""`swinmoe profile exchange` between gloo processes: rows arrive, bytes are those of the matrix, records and a page."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool

from swinmoe.cli import main
from swinmoe.config.profile_exchange import ExchangeSweepConfig, ExchangeWorkload
from swinmoe.errors import ConfigError
from swinmoe.parallel import make_mesh
from swinmoe.parallel.tokens_travel import TokensTravel
from swinmoe.profiling import exchange
from swinmoe.profiling.exchange import profile_exchange, skewed_rows
from swinmoe.records import read_records

pytestmark = pytest.mark.distributed


def arrivals(workload: ExchangeWorkload, each: int) -> bool:
    """Rows say where they come from and go to; is everything that arrives here meant for here, in order?"""
    parallel = workload.parallel(torch.distributed.get_world_size())
    group = make_mesh(parallel).token_group(parallel)
    matrix = skewed_rows(group.size, each, workload.skew)
    way = TokensTravel(group, slices=1, chunks=workload.chunks, payload=workload.payload, batch=None)
    plan = way.prepare(matrix[group.rank], None).plan
    to = torch.arange(group.size).repeat_interleave(matrix[group.rank])
    sent = torch.stack([torch.full_like(to, group.rank), to], dim=1).float().requires_grad_()
    got = exchange._travel(sent, plan, workload.payload)
    came = torch.arange(group.size).repeat_interleave(matrix[:, group.rank])
    right = sorted(got[:, 0].tolist()) == came.tolist() and bool((got[:, 1] == group.rank).all())
    (back,) = torch.autograd.grad(got, sent, got.detach(), retain_graph=True)
    (again,) = torch.autograd.grad(got, sent, got.detach(), retain_graph=True)  # as a profile does, many times
    return right and torch.equal(back, sent) and torch.equal(again, sent)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"skew": 0.9},
        {"skew": 1.0, "payload": "bf16"},
        {"chunks": 3, "skew": 0.5},
        {"exchange": "2dh", "local_size": 2},
        {"exchange": "2dh", "local_size": 2, "chunks": 2, "skew": 0.7, "payload": "bf16"},
        {"ep_size": 2, "skew": 0.5},
    ],
    ids=str,
)
def test_rows_arrive_and_their_gradients_return(pool4: Pool, settings: dict[str, Any]) -> None:
    assert all(pool4.run(arrivals, ExchangeWorkload(**settings), 6))


def measured(config: ExchangeSweepConfig) -> list[tuple[str, dict[str, Any]]]:
    return list(profile_exchange(config))


def test_bytes_and_bandwidths_are_those_of_the_rows(pool4: Pool) -> None:
    """4 ranks, 3 rows of 32 bytes for each: by hand."""
    config = ExchangeSweepConfig(
        bytes=(96,), dim=8, skew=(0.0, 1.0), exchange=("flat", "2dh"), local_size=(None, 2), rounds=1, backward=True
    )
    results = pool4.run(measured, config)
    names = [[line["name"] for _, line in own] for own in results]
    assert names.count(names[0]) == 4
    lines = {line["name"]: line for _, line in results[0]}
    even, hot = lines["flat 96 B, skew 0, forward"], lines["flat 96 B, skew 1, forward"]
    staged = lines["2dh 96 B, skew 0, nodes of 2, forward"]
    assert len(lines) == 8  # flat with nodes is refused, 2DH in one node too
    seconds = even["ms"]["median"] / 1000
    assert even["algbw"] == pytest.approx(4 * 96 / seconds) and even["busbw"] == pytest.approx(3 * 96 / seconds)
    assert (even["bytes_sent"], even["busiest_bytes"], even["message_bytes"]) == (288, 288, 96)
    # three ranks send all they have, and the first receives it
    assert (hot["bytes_sent"], hot["busiest_bytes"]) == (3 * 384 / 4, 3 * 384)
    assert staged["bytes_sent"] == 2 * 2 * 96  # both stages move half of the rows
    assert staged["baseline"] == even["name"] and hot["baseline"] == even["name"] and even["baseline"] is None


def through_the_command(folder: Path) -> int:
    os.environ["COLUMNS"] = "200"
    argv = ["--bytes", "1KiB,4KiB,16KiB", "--skew", "0,0.5", "--rounds", "2", "--out", str(folder)]
    argv += ["--trace", str(folder / "traces" / "trace.json")]
    sys.argv = ["swinmoe", "profile", "exchange", *argv]
    try:
        main()
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def test_the_command_leaves_records_fits_and_a_page(pool2: Pool, tmp_path: Path) -> None:
    assert pool2.run(through_the_command, tmp_path) == [0, 0]
    lines = read_records(tmp_path / "records.jsonl")
    kinds = [line["kind"] for line in lines]
    assert kinds == ["profile", *["measurement"] * 12, *["fit"] * 2]
    assert lines[0]["what"] == "exchange" and lines[0]["workload"]["bytes"] == [1024, 4096, 16384]
    for fit, direction in zip(lines[-2:], ("forward", "backward"), strict=True):
        assert fit["variant"]["direction"] == direction and fit["variant"]["ep_size"] == 2
        own = {line["name"]: line for line in lines[1:13]}
        for point in fit["points"]:
            assert point["seconds"] == own[point["name"]]["ms"]["median"] / 1000
            assert point["predicted"] / point["seconds"] - 1 == pytest.approx(point["error"])
            assert own[point["name"]]["variant"]["skew"] == 0
        assert fit["worst_error"] == pytest.approx(max(abs(point["error"]) for point in fit["points"]))
    page = (tmp_path / "report.html").read_text()
    assert "Exchanges by themselves" in page and "The link that explains them" in page
    named = {line["name"] for line in lines[1:13]}
    smallest = {name for name in named if "1 KiB" in name}
    assert len(smallest) == 4
    files = sorted((tmp_path / "traces").iterdir())
    assert [file.name for file in files] == ["trace.rank0.json", "trace.rank1.json"]
    for file in files:
        events = json.loads(file.read_text())["traceEvents"]
        exchanges = [event["name"] for event in events if event["ph"] == "X" and event["name"] in named]
        assert sorted(exchanges) == sorted(smallest), "each once, of the first size alone"
        track = [event for event in events if event.get("cat") == "phases" and event.get("ph") == "X"]
        track = [event for event in track if event["name"] == "exchange_out"]
        assert [event["args"]["pass"] for event in track] == ["forward", "backward"] * 2
        waits = [event for event in events if event["name"] == "_Wait"]
        middles = [event["ts"] + event["dur"] / 2 for event in waits]
        around = [[e["ts"] <= middle <= e["ts"] + e["dur"] for e in track].index(True) for middle in middles]
        assert around == [0, 2], "in the phases of the two forward exchanges"


def test_one_process_has_nobody_to_send_to() -> None:
    with pytest.raises(ConfigError, match="at least two processes"):
        next(profile_exchange(ExchangeSweepConfig()))
