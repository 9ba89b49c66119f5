"""The process around a run: what a launcher says, which accelerator follows, what is recorded, who speaks."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

from swinmoe.errors import BackendUnavailableError, ConfigError, DistributedError
from swinmoe.runtime import (
    agree,
    describe_environment,
    launched_rank,
    launched_world,
    make_accelerator,
    start_processes,
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


def test_the_launcher_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (launched_world(), launched_rank()) == (1, 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert (launched_world(), launched_rank()) == (4, 3)
    monkeypatch.setenv("WORLD_SIZE", "four")
    with pytest.raises(DistributedError, match="WORLD_SIZE='four' is not a number"):
        launched_world()


def test_an_incomplete_launch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        DistributedError, match="RANK, MASTER_ADDR, MASTER_PORT is not set; start several processes with"
    ):
        start_processes()


def test_an_unreachable_job_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound but not listening: nobody answers here
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(DistributedError, match=f"rank 1 of 2 could not join the others at 127.0.0.1:{port}"):
            start_processes(cpu=True, join_minutes=0.01)


@pytest.mark.parametrize(("precision", "autocast"), [("fp32", "no"), ("bf16", "bf16"), ("fp64", "no")])
def test_precision_becomes_autocast(precision: str, autocast: str) -> None:
    accelerator = make_accelerator(precision, cpu=True)
    assert accelerator.mixed_precision == autocast
    assert accelerator.device.type == "cpu"
    assert accelerator.num_processes == 1


def test_settings_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'int8' is unknown; use one of"):
        make_accelerator("int8")
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        make_accelerator("fp16", cpu=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match="TensorBoard is not installed"):
        make_accelerator("fp32", tmp_path, cpu=True)


def test_tensorboard_is_fed_through_the_tracker(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    accelerator = make_accelerator("fp32", tmp_path, cpu=True)
    accelerator.init_trackers("run")
    accelerator.log({"loss": 1.0}, step=1)
    accelerator.end_training()
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_the_environment_tells_versions_and_nothing_private() -> None:
    environment = describe_environment()
    assert environment["torch"] == torch.__version__.split("+")[0]
    assert environment["world_size"] == 1 and environment["cores"] >= 1 and environment["cpu"]
    text = json.dumps(environment)
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text


def test_alone_there_is_nothing_to_disagree_on() -> None:
    agree({"anything": 1})
