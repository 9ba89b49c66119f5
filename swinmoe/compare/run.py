"""`swinmoe compare`: the arms of every seed, in lockstep or one after the other, and the report."""

from __future__ import annotations

from pathlib import Path

from swinmoe.compare.analysis import write_routing_pictures
from swinmoe.compare.arms import match_lengths, resolve_arms, shared_run
from swinmoe.config import CompareConfig
from swinmoe.errors import ConfigError
from swinmoe.records import read_records
from swinmoe.report import ReportPaths, write_report
from swinmoe.train import fit, make_arm, open_session
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
    if config.resume == "auto" and _finished(session, list(runs), seed):
        session.progress.say(f"seed {seed} is already trained")
        return
    job = session.job(shared_run(runs), f"seed-{seed}")
    per_epoch = job.stream.steps_per_epoch
    lengths = match_lengths(config, runs, per_epoch)
    arms = [
        make_arm(name, run, session.mesh, session.accelerator, lengths[name], per_epoch) for name, run in runs.items()
    ]
    session.begin()
    for arm in arms:
        session.describe(arm)
    if config.schedule == "lockstep":
        fit(job, arms)
    else:
        for arm in arms:
            alone = session.job(runs[arm.name], f"seed-{seed}/{arm.name}")
            fit(alone, [arm])
    for arm in arms:
        write_routing_pictures(job, arm, config.sample_images)
    session.records.write("note", text=f"seed {seed} complete")


def _finished(session: Session, names: list[str], seed: int) -> bool:
    """True if the records already hold this seed's finals and pictures (same answer on all ranks: same file)."""
    path = session.folder / "records.jsonl"
    lines = read_records(path) if path.exists() else []
    done = {line["arm"] for line in lines if line["kind"] == "final" and line["seed"] == seed}
    noted = {(line["text"]) for line in lines if line["kind"] == "note"}
    return done >= set(names) and f"seed {seed} complete" in noted
