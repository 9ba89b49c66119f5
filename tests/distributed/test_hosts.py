"""A real training run over two hosts: two network namespaces joined by a rate-limited link."""

from __future__ import annotations

from pathlib import Path

import faults
import pytest
import two_hosts
import yaml

from swinmoe.records import read_records

pytestmark = pytest.mark.distributed

RUN = faults.RUN | {
    "model": faults.RUN["model"] | {"drop_path_rate": 0.0},  # ranks draw their own
    "train": faults.RUN["train"] | {"steps": 4, "precision": "fp64"},
    "checkpoint": {},
    "parallel": {},
}


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_records(folder / "records.jsonl") if r["kind"] in ("step", "eval", "final")]


def test_experts_spread_over_two_hosts_train_as_on_one_process(tmp_path: Path) -> None:
    if (reason := two_hosts.why_not()) is not None:
        pytest.skip(f"two hosts cannot be made here: {reason}")
    from swinmoe.config.io import load
    from swinmoe.config.run import RunConfig
    from swinmoe.train import train

    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(RUN))
    train(load(RunConfig, config, [f"output_dir={tmp_path}", "name=one"]), show=False)
    with two_hosts.two_hosts(rate="100mbit") as hosts:
        ended = hosts.launch("train", str(config), f"output_dir={tmp_path}", "name=two", "parallel.ep_size=2")
    assert [host.status for host in ended] == [0, 0], [host.stderr for host in ended]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-12)
    environment = read_records(tmp_path / "two" / "records.jsonl")[0]["environment"]
    assert environment["world_size"] == 2


def test_hosts_leave_nothing_behind() -> None:
    if (reason := two_hosts.why_not()) is not None:
        pytest.skip(f"two hosts cannot be made here: {reason}")
    with two_hosts.two_hosts() as hosts:
        sleeper = hosts.start(0, ["sleep", "600"])
        assert set(hosts.namespaces) <= two_hosts.namespaces()
    assert sleeper.returncode == -9
    assert not set(hosts.namespaces) & two_hosts.namespaces()
