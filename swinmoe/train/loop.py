"""The training loop: one or several arms on the same batches, in lockstep, resumable to the bit.

Every random draw is keyed by (seed, step ...), every batch by (seed, epoch, index), so a checkpoint holds no generator
state and a resumed run repeats an uninterrupted one exactly.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from typing import Never

import torch

from swinmoe.checkpoint import Saver
from swinmoe.config import RunConfig
from swinmoe.errors import NonFiniteLossError, Preempted
from swinmoe.train.arm import Arm
from swinmoe.train.evaluate import evaluate
from swinmoe.train.job import Job
from swinmoe.train.place import place
from swinmoe.train.resume import Start, go_on_from, make_saver, save
from swinmoe.train.stopping import StopSignals


def fit(job: Job, arms: Sequence[Arm], start: Start) -> None:
    """Train `arms` to their lengths on the same batches, strictly one after another within a step.

    `start` is what `restore(job, arms)` returned.

    The order alternates from step to step, so that a machine whose speed drifts treats the arms alike; an arm that is
    done idles. Writes `step`, `eval` and `final` records and checkpoints.

    Raises:
        NonFiniteLossError: an arm's loss left the finite numbers; earlier checkpoints are kept.
        CheckpointError: a checkpoint could not be written; earlier ones are kept.
        Preempted: SIGTERM or SIGUSR1 came to one of the ranks; all have stopped after the same step, which is saved.
    """
    go_on_from(job, arms, start)
    if all(arm.done for arm in arms):
        return
    if keeps_no_best(job.run, job.stream.steps_per_epoch, max(arm.length.steps or sys.maxsize for arm in arms)):
        job.progress.say(
            f"checkpoint.keep_best={job.run.checkpoint.keep_best} has nothing to choose from: no step before the last "
            "is both evaluated and saved; let train.eval_every_epochs and checkpoint.every_epochs or every_steps meet"
        )
    saver = make_saver(job, arms)
    with StopSignals() as signals:  # until the last file is on the disk: being told to stop must not tear that
        try:
            _train(job, arms, start.step, saver, signals)
        except (NonFiniteLossError, Preempted):  # raised by all ranks alike
            saver.finish()
            raise
        saver.finish()
        asked, _ = signals.agree(job.mesh, busy=False)
    if asked is not None:  # a comparison has more seeds to train, and whoever asked will not wait for them
        raise _stopped(job, asked, max(arm.step for arm in arms))


def _train(job: Job, arms: Sequence[Arm], step: int, saver: Saver, signals: StopSignals) -> None:
    limits = [arm.length.steps for arm in arms]
    stop = sys.maxsize if None in limits else max(n for n in limits if n is not None)
    waited = time.perf_counter()
    with job.progress.open([(arm.name, arm.length.steps) for arm in arms]):
        for micro_batches in job.stream.iterate(step, stop):
            batches = tuple(place(b, arms[0].device, job.run.train.precision) for b in micro_batches)
            wait = time.perf_counter() - waited
            running = [arm for arm in arms if not arm.done]
            with job.around_step(step + 1):
                for arm in running if step % 2 == 0 else reversed(running):
                    arm.train_step(batches)
                    if arm.capacity_changes:
                        owner = {"arm": arm.name, "seed": arm.run.seed, "step": arm.step}
                        job.records.write("capacity", **owner, layers=arm.capacity_changes)
            step += 1
            job.progress.stepped(waited=wait, worked=time.perf_counter() - waited - wait)
            _after_step(job, arms, running, step, saver)
            if all(arm.done for arm in arms):
                break
            asked, busy = signals.agree(job.mesh, saver.busy)
            if saver.in_flight and not busy:
                saver.advance()
            if asked is not None:
                _preempt(job, arms, step, saver, asked)
            waited = time.perf_counter()


def _preempt(job: Job, arms: Sequence[Arm], step: int, saver: Saver, signal: str) -> Never:
    if saver.last_step != step:
        for arm in arms:
            if arm.unlogged_steps:  # sums on their way to the log are not saved
                _log_step(job, arm)
        save(job, saver, arms, step)
    saver.finish()
    raise _stopped(job, signal, step)


def _stopped(job: Job, signal: str, step: int) -> Preempted:
    job.records.write("note", text=f"stopped by {signal} after step {step}")
    return Preempted(f"stopped by {signal} after step {step}, which is saved; go on with resume=auto")


def _after_step(job: Job, arms: Sequence[Arm], running: Sequence[Arm], step: int, saver: Saver) -> None:
    save_now = _saves_at(job, step) or all(arm.done for arm in arms)
    for arm in running:
        if save_now or arm.done or step % job.run.log.every_steps == 0:
            _log_step(job, arm)
        if arm.done or _evaluates_at(job, step):
            _log_evaluation(job, arm)
        job.progress.advance(arm)
    if save_now:
        save(job, saver, arms, step)


def _evaluates_at(job: Job, step: int) -> bool:
    every = job.run.train.eval_every_epochs
    return every is not None and step % max(1, round(every * job.stream.steps_per_epoch)) == 0


def _saves_at(job: Job, step: int) -> bool:
    settings, epoch = job.run.checkpoint, job.stream.steps_per_epoch
    at_step = settings.every_steps > 0 and step % settings.every_steps == 0
    at_epoch = settings.every_epochs > 0 and step % (settings.every_epochs * epoch) == 0
    return at_step or at_epoch


def keeps_no_best(run: RunConfig, steps_per_epoch: int, steps: int) -> bool:
    """True if `checkpoint.keep_best` is set, and saves and evaluations never meet before the last of `steps`."""
    settings, every = run.checkpoint, run.train.eval_every_epochs
    if not settings.keep_best:
        return False
    if every is None:
        return True
    evaluated = max(1, round(every * steps_per_epoch))
    saved = (settings.every_steps, settings.every_epochs * steps_per_epoch)
    return not any(period and math.lcm(evaluated, period) < steps for period in saved)


def _log_step(job: Job, arm: Arm) -> None:
    numbers = arm.take_log()
    rate, peak = numbers["images_per_second"], job.peak_flops
    numbers |= {
        "data_wait": job.progress.wait_share(),
        "mfu": rate * arm.counts.train_flops / (peak * job.mesh.world) if rate and peak else None,
        "peak_memory_bytes": peak_memory_bytes(arm.device),
    }
    epoch = arm.step / job.stream.steps_per_epoch
    job.records.write("step", arm=arm.name, seed=arm.run.seed, step=arm.step, epoch=epoch, **numbers)
    job.progress.logged(arm, numbers)
    if job.tracker is not None:
        flat = {k: v for k, v in numbers.items() if isinstance(v, int | float)}
        for layer, values in numbers["routing"].items():
            flat |= {f"{layer}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        job.tracker.log({f"{arm.name}-seed{arm.run.seed}/{k}": v for k, v in flat.items()}, step=arm.step)


def _log_evaluation(job: Job, arm: Arm) -> None:
    found = evaluate(arm, job.bundle.eval, job.run.train.eval_batch_size, job.run.data.workers)
    arm.scored = (arm.step, found["accuracy"])
    place_in_run = {
        "step": arm.step,
        "epoch": arm.step / job.stream.steps_per_epoch,
        "images": arm.images,
        "flops": arm.flops,
        "seconds": arm.seconds,
    }
    owner = {"arm": arm.name, "seed": arm.run.seed}
    job.records.write("eval", **owner, **place_in_run, split=job.bundle.eval_split, **found)
    job.progress.evaluated(arm, found)
    if job.tracker is not None:
        values = {f"{arm.name}-seed{arm.run.seed}/eval_{k}": found[k] for k in ("loss", "accuracy")}
        job.tracker.log(values, step=arm.step)
    if arm.done:
        reason = "trained for its steps" if arm.length.steps is not None else "used its seconds"
        job.records.write(
            "final", **owner, step=arm.step, loss=final_loss(arm), accuracy=found["accuracy"], reason=reason
        )


def final_loss(arm: Arm) -> float | None:
    """Mean training loss over the last tenth of the arm's steps (single batches are noisy)."""
    since = arm.step * 0.9
    spans = [
        (step - before, loss)
        for (before, _), (step, loss) in zip([(0, 0.0), *arm.history], arm.history, strict=False)
        if step > since
    ]
    weight = sum(n for n, _ in spans)
    return sum(n * loss for n, loss in spans) / weight if weight else None


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the device for CUDA, the process's resident set for CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
