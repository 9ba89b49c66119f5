"""What surrounds a profile: processes, threads, the records' folder."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swinmoe.errors import CheckpointError, ConfigError
from swinmoe.profiling.trace import of_rank
from swinmoe.records import RunRecord, read_records
from swinmoe.runtime import agree, describe_environment, launched_rank, launched_world, start_processes, stop_processes
from swinmoe.runtime.accelerator import wants_cpu


@dataclass(frozen=True)
class ProfileSession:
    """One process's view of a profile."""

    device: torch.device
    rank: int
    records: RunRecord

    @property
    def is_main(self) -> bool:
        """True on the process that writes and prints."""
        return self.rank == 0

    def rank_file(self, path: Path | None) -> Path | None:
        """`path` with this rank in its name, where there are several."""
        return None if path is None else of_rank(path, self.rank, launched_world())

    def begin(self, what: str, command: str, workload: Mapping[str, Any]) -> None:
        """Write the `profile` record that the measurements after it belong to."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.records.write(
            "profile", what=what, command=command, workload=dict(workload), environment=describe_environment(), time=now
        )


def _holds_records(path: Path) -> bool:
    """More than the beginning of a profile that was interrupted before it had measured anything."""
    try:
        return path.exists() and any(line["kind"] != "profile" for line in read_records(path))
    except CheckpointError:  # damaged: not ours to remove
        return True


@contextmanager
def profile_session(
    out: Path | None, settings: Mapping[str, Any], threads: int | None = None
) -> Iterator[ProfileSession]:
    """Join the other processes, if a launcher started any, and open the records; a collective call.

    Args:
        out: folder for `records.jsonl`, written by rank 0; None = nowhere.
        settings: what all ranks must have been started with alike.
        threads: CPU threads of this process; None = as they are.

    Raises:
        ConfigError: the folder holds records already.
        DistributedError: ranks were started differently.
    """
    cpu = wants_cpu()
    joined = start_processes(cpu=cpu)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())
    path = None if out is None else out / "records.jsonl"
    used = path is not None and _holds_records(path)
    agree({f"the profile's {key}": value for key, value in settings.items()} | {"whether --out holds records": used})
    if used:
        raise ConfigError(f"{str(path)!r} holds records already; give another --out, or remove it")
    rank = launched_rank()
    if path is not None and rank == 0 and path.exists():
        path.unlink()
    try:
        yield ProfileSession(device, rank, RunRecord(path if rank == 0 else None))
    finally:
        torch.set_num_threads(before)
    # Only after success: a rank that failed must not wait for its peers here.
    if joined:
        stop_processes()
