"""`swinmoe tune exchange` on two processes: one answer on both, measured once and then remembered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from pool import Pool

from swinmoe.commands import tune_exchange
from swinmoe.commands.tune_exchange import ExchangeOptions, _tune, parse_ep_sizes, run_exchange
from swinmoe.config import RunConfig
from swinmoe.config.io import build, load
from swinmoe.errors import ConfigError
from swinmoe.profiling.session import ProfileSession
from swinmoe.profiling.tune.ways import Way
from swinmoe.records import RunRecord

pytestmark = pytest.mark.distributed
TREE = {
    "name": "tiny",
    "model": {
        "preset": "swin_moe_micro",
        "img_size": 16,
        "in_chans": 1,
        "embed_dim": 8,
        "num_heads": [1, 2],
        "patch_size": 4,
        "moe": {"num_experts": 4},
    },
    "train": {"batch_size": 8},
    "data": {"image_size": 16},
}


def tuned(cache: str) -> tuple[Way, list[str], list[list[str]]]:
    rank = int(os.environ["RANK"])
    session = ProfileSession(torch.device("cpu"), rank, RunRecord(None))
    way, trials = _tune(build(RunConfig, TREE), 2, ExchangeOptions(rounds=2, cache=Path(cache)), session)
    return way, [trial.choice for trial in trials], [[str(way) for way, _ in trial.tried] for trial in trials]


def test_both_ranks_find_the_same_and_remember_it(pool2: Pool, tmp_path: Path) -> None:
    cache = tmp_path / "exchange.json"
    (way, choices, tried), other = pool2.run(tuned, str(cache))
    assert other == (way, choices, tried)
    assert choices[:2] == ["ranks and what travels", "layout"]
    assert len(tried[0]) == 3 and "ep_size 2, weights, ragged" in tried[0]
    (entry,) = json.loads(cache.read_text())["entries"].values()
    assert Way(**entry["way"]) == way and entry["ms"] > 0 and entry["shape"]["world"] == 2
    assert pool2.run(tuned, str(cache)) == [(way, [], []), (way, [], [])]


def test_the_command_starts_its_processes_and_writes_a_config(tmp_path: Path) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "tuned.yaml"
    config.write_text(yaml.safe_dump(TREE))
    words = ["tune", "exchange", str(config), "train.batch_size=4", "--processes", "2", "--rounds", "1", "--inference"]
    words += ["--ep-sizes", "2", "--cache", str(tmp_path / "cache.json"), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "swinmoe.cli", *words], capture_output=True, text=True, timeout=540, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "best here: ep_size 2" in done.stdout and "parallel: {ep_size: 2" in done.stdout
    run = load(RunConfig, out)
    assert run.parallel.ep_size == 2 and run.train.batch_size == 4 and run.name == "tiny"


def refused(config: str, out: str) -> str:
    with mock.patch.object(tune_exchange, "_tune", side_effect=AssertionError("measured")):
        try:
            run_exchange(Path(config), [], ExchangeOptions(), processes=None, out=Path(out))
        except ConfigError as error:
            return str(error)
    return ""


def test_a_file_that_cannot_be_written_is_refused_before_all_measuring(pool2: Pool, tmp_path: Path) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "none" / "best.yaml"
    config.write_text(yaml.safe_dump(TREE))
    for found in (*pool2.run(refused, str(config), str(out)), refused(str(config), str(out))):
        assert f"--out {out}: the folder" in found


def test_what_cannot_be_tuned_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "dense.yaml"
    config.write_text(yaml.safe_dump({**TREE, "model": {**TREE["model"], "moe": None, "moe_blocks": []}}))
    with pytest.raises(ConfigError, match="needs a sparse model"):
        run_exchange(config, [], ExchangeOptions(), processes=None, out=None)
    with pytest.raises(ConfigError, match="--rounds 0 must be at least 1"):
        ExchangeOptions(rounds=0)
    assert parse_ep_sizes("1, 2,2") == (1, 2) and parse_ep_sizes(None) is None
    for text in ("", "a", "0", "1,-2"):
        with pytest.raises(ConfigError, match="give numbers of ranks"):
            parse_ep_sizes(text)
