"""`swinmoe compare`: the arms of every seed, in lockstep or one after the other, and the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from swinmoe.compare.analysis import write_routing_pictures
from swinmoe.compare.arms import match_lengths, resolve_arms, shared_run
from swinmoe.config import CompareConfig, RunConfig
from swinmoe.config.io import to_tree
from swinmoe.errors import CheckpointError, ConfigError
from swinmoe.records import read_records
from swinmoe.report import ReportPaths, write_report
from swinmoe.train import check_same, fit, make_arm, open_session, restore
from swinmoe.train.session import Session


def compare(config: CompareConfig, *, show: bool = True) -> ReportPaths | None:
    """Train all arms for all seeds and write the report; returns its paths on the main process, None elsewhere.

    Raises:
        SwinMoEError: arms that contradict each other, a used folder, a non-finite loss ...
    """
    folder = Path(config.output_dir) / config.name
    if config.resume not in ("never", "auto") and (len(config.seeds) > 1 or config.schedule == "sequential"):
        raise ConfigError(
            f"compare was given resume={config.resume!r}, one checkpoint, for {len(config.seeds)} seeds and schedule: "
            f"{config.schedule}; use resume=auto, which finds each one's own"
        )
    if config.resume != "never":
        _check_same_match(config, folder / "records.jsonl")
    every = {seed: resolve_arms(config, seed) for seed in config.seeds}
    first = shared_run(every[config.seeds[0]])
    with open_session("compare", first, config=config, folder=folder, resume=config.resume, show=show) as session:
        for position, seed in enumerate(config.seeds):
            if len(config.seeds) > 1:
                session.progress.say(f"seed {seed} ({position + 1} of {len(config.seeds)})")
            _train_seed(config, session, seed)
        if not session.main:
            return None
        return write_report(folder / "records.jsonl", folder)


def _train_seed(config: CompareConfig, session: Session, seed: int) -> None:
    runs = resolve_arms(config, seed)
    if config.resume == "auto" and _finished(session, runs, seed):
        session.progress.say(f"seed {seed} is already trained")
        return
    groups = [list(runs)] if config.schedule == "lockstep" else [[name] for name in runs]
    for names in groups:
        inside = f"seed-{seed}" if len(groups) == 1 else f"seed-{seed}/{names[0]}"
        job = session.job(shared_run(runs), inside)
        per_epoch = job.stream.steps_per_epoch
        lengths = match_lengths(config, runs, per_epoch)
        arms = [
            make_arm(name, runs[name], session.mesh, session.accelerator, lengths[name], per_epoch) for name in names
        ]
        start = restore(job, arms)
        session.begin()
        for arm in arms:
            session.describe(arm)
        fit(job, arms, start)
        for arm in arms:
            write_routing_pictures(job, arm, config.sample_images)
        session.forget_models()
    session.records.write("note", text=_complete(seed))


def _finished(session: Session, runs: Mapping[str, RunConfig], seed: int) -> bool:
    """True if the records hold all of this seed (same answer on all ranks: same file).

    Raises:
        CheckpointError: it was trained by another config, and would be averaged with what this one trains.
    """
    path = session.folder / "records.jsonl"
    lines = read_records(path) if path.exists() else []
    if not any(line["kind"] == "note" and line["text"] == _complete(seed) for line in lines):
        return False
    trained = {line["arm"]: line["config"] for line in lines if line["kind"] == "arm" and line["seed"] == seed}
    for name, run in runs.items():
        if name not in trained:
            return False
        check_same(f"seed {seed} of arm {name!r} in {str(path)!r}", trained[name], to_tree(run))
    return True


def _check_same_match(config: CompareConfig, path: Path) -> None:
    """Refuse to go on with arms matched on something else."""
    begun = [line for line in read_records(path) if line["kind"] == "run"] if path.exists() else []
    for key in ("match", "budget_seconds", "reference", "schedule"):
        if begun and begun[-1]["config"].get(key) != getattr(config, key):
            raise CheckpointError(
                f"{str(path)!r} was begun with {key}: {begun[-1]['config'].get(key)}, not {getattr(config, key)}; "
                "go on with the same, or start a new comparison under another name"
            )


def _complete(seed: int) -> str:
    return f"seed {seed} complete"
