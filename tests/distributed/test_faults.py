"""What one rank's end does to a real training job: the others end too, the cause is said once, nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faults
import pytest
import torch

from swinmoe.checkpoint import latest_checkpoint, load_checkpoint
from swinmoe.records import read_records

pytestmark = pytest.mark.distributed

TIMED = ("seconds", "images_per_second", "data_wait", "mfu", "peak_memory_bytes", "time")
"""What differs between two runs of one config."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the config, and `whole`: the same job, undisturbed."""
    path = tmp_path_factory.mktemp("faults")
    faults.write_config(path)
    [ended] = faults.await_end([faults.start(faults.local(), path, "whole")])
    assert ended.status == 0, ended.stderr
    return path


def run(folder: Path, name: str, *overrides: str, launcher: list[str] | None = None, **fault: Any) -> faults.Ended:
    [ended] = faults.await_end([faults.start(launcher or faults.local(), folder, name, *overrides, **fault)])
    return ended


def trained(folder: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The records that count, without times, and all tensors of the last checkpoint."""
    kept = [
        {key: value for key, value in record.items() if key not in TIMED}
        for record in read_records(folder / name / "records.jsonl")
        if record["kind"] in ("step", "eval", "final")
    ]
    last = latest_checkpoint(folder / name / "checkpoints")
    assert last is not None
    tensors = load_checkpoint(last).tensors
    return kept, {f"{file}/{key}": value for file, group in tensors.items() for key, value in group.items()}


def assert_as_whole(folder: Path, name: str) -> None:
    """The job's records and last checkpoint are those of the undisturbed job, bit by bit."""
    records, tensors = trained(folder, name)
    whole, expected = trained(folder, "whole")
    assert records == whole and len(records) > faults.STEPS
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_a_killed_rank_ends_the_job_and_a_restart_repeats_the_undisturbed_run(folder: Path) -> None:
    ended = run(folder, "killed", fault="kill")
    assert ended.status == 137
    process, word = faults.own_words(ended.stderr)
    assert process == "launch/local.sh: rank 1 was ended by SIGKILL (exit status 137)"
    assert word.startswith("swinmoe: rank 0: ") and " did not finish (" in word
    assert word.endswith("No word came from rank 1: it was killed, or hangs")
    assert faults.last_saved(folder, "killed") == 8
    ended = run(folder, "restarted", "resume=auto", launcher=faults.local("--max-restarts", "1"), fault="kill")
    assert ended.status == 0, ended.stderr
    assert "starting again (restart 1 of 1)" in ended.stderr and "resumed at step 8" in ended.stderr
    assert_as_whole(folder, "restarted")


def test_an_error_of_one_rank_is_said_once_and_with_its_rank(folder: Path) -> None:
    ended = run(folder, "raised", fault="raise")
    assert ended.status == 1
    [word] = faults.own_words(ended.stderr)
    assert word.startswith("swinmoe: rank 1: unexpected ValueError: the sky fell on this rank")
    assert faults.last_saved(folder, "raised") == 8


def test_a_rank_with_another_config_is_named_before_anything_is_written(folder: Path) -> None:
    ended = run(folder, "other", fault="config")
    assert ended.status == 2
    assert faults.own_words(ended.stderr) == [
        "swinmoe: ranks disagree on the config's optim.base_lr: rank 0 has '0.003', but rank 1 has '0.5'; start all "
        "processes with the same config, code and data"
    ]
    assert not (folder / "other").exists()


def test_a_stopped_rank_is_given_up_after_the_timeout_and_ended(folder: Path) -> None:
    ended = run(folder, "stopped", f"parallel.timeout_minutes={faults.IMPATIENT}", fault="stop")
    assert ended.status == 1
    [word] = faults.own_words(ended.stderr)
    assert word.startswith("swinmoe: rank 0: layers.1.blocks.1.mlp: ")
    assert "imed out" in word and word.endswith("No word came from rank 1: it was killed, or hangs")
    assert faults.last_saved(folder, "stopped") == 8


@pytest.mark.parametrize("wrong", [["model.depth=3"], ["resume=never"]], ids=["a config", "restarts without resuming"])
def test_what_all_ranks_have_to_say_is_said_once(folder: Path, wrong: list[str]) -> None:
    ended = run(folder, "wrong", *wrong, launcher=faults.local("--max-restarts", "3"))
    assert ended.status == 2  # and not started again: it would be wrong again
    [word] = faults.own_words(ended.stderr)
    assert word.startswith("swinmoe: ") and "rank" not in word
    assert not (folder / "wrong").exists()


def test_two_agents_train_as_two_machines_and_start_again_after_a_kill(folder: Path) -> None:
    agents = faults.agents("--max-restarts", "1")
    jobs = [faults.start(agent, folder, "agents", "resume=auto", fault="kill") for agent in agents]
    ended = faults.await_end(jobs)
    assert [e.status for e in ended] == [0, 0], [e.stderr for e in ended]
    assert any("resumed at step 8" in e.stderr for e in ended)
    assert_as_whole(folder, "agents")
