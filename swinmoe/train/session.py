"""What surrounds training: processes, output folder, records, data. Shared by `train` and `compare`."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from swinmoe.config import RunConfig
from swinmoe.config.io import dump, to_tree
from swinmoe.data import DataBundle, TrainStream, build_data
from swinmoe.errors import ConfigError
from swinmoe.moe.experts import Experts
from swinmoe.parallel import Mesh, make_mesh
from swinmoe.records import RunRecord
from swinmoe.runtime import (
    UNKNOWN,
    agree,
    describe_code,
    describe_environment,
    launched_restarts_allowed,
    make_accelerator,
    stop_processes,
    use_tf32,
)
from swinmoe.train.arm import Arm
from swinmoe.train.job import Job
from swinmoe.train.peak import measure_peak_flops
from swinmoe.train.progress import Progress


@dataclass
class Session:
    """One process's view of a job."""

    command: str
    config: Any
    """What the run record keeps whole: a `RunConfig` or a `CompareConfig`."""
    run: RunConfig
    folder: Path
    resume: str
    accelerator: Any
    mesh: Mesh
    records: RunRecord
    progress: Progress
    begun: bool = False

    @property
    def main(self) -> bool:
        """True on the process that writes."""
        return self.mesh.rank == 0

    @cached_property
    def peak_flops(self) -> float:
        """FLOP/s that utilisation is stated against: given, or measured once."""
        return self.run.log.peak_flops or measure_peak_flops(self.accelerator.device, self.run.train.precision)

    def forget_models(self) -> None:
        """Let go of trained models: Accelerate keeps every model that it has prepared."""
        self.accelerator.free_memory()

    def begin(self) -> None:
        """Write the `run` record and the config, once: after everything that can be refused has been looked at, so that
        a refused run leaves nothing behind."""
        if self.begun:
            return
        self.begun = True
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        tree, environment = to_tree(self.config), describe_environment()
        self.records.write(
            "run", command=self.command, name=self.folder.name, config=tree, environment=environment, time=now
        )
        if self.main:
            (self.folder / "config.yaml").write_text(dump(self.config))
        if self.run.log.tensorboard:
            self.accelerator.init_trackers(self.run.name)

    def job(self, run: RunConfig, name: str = "") -> Job:
        """Data and checkpoints for the arms of one seed; `name` separates the seeds' checkpoints."""
        bundle = build_data(run.data, seed=run.seed)
        agree({"the number of training images": len(bundle.train), "the number of test images": len(bundle.eval)})
        check_data_fits(run, bundle)
        return Job(
            run=run,
            mesh=self.mesh,
            bundle=bundle,
            stream=make_stream(run, bundle, self.mesh),
            records=self.records,
            checkpoints=self.folder / "checkpoints" / name,
            resume=self.resume,
            progress=self.progress,
            peak_flops=self.peak_flops,
            tracker=self.accelerator if run.log.tensorboard else None,
        )

    def describe(self, arm: Arm) -> None:
        """Write the `arm` record: what is being trained, in numbers; say what `moe.dispatcher=auto` takes."""
        counts, moe = arm.counts, arm.run.model.moe
        # Alike in all layers: device, dtype and capacity are.
        taken, reason = next((layer.dispatcher_taken() for layer in arm.raw.moe_layers().values()), (None, ""))
        if reason:
            self.progress.say(f"{arm.name:>10} moe.dispatcher=auto takes {taken}: {reason}")
        tactics = memory_tactics(arm, self.mesh.world)
        if tactics:
            self.progress.say(f"{arm.name:>10} saves memory by {'; '.join(tactics)}")
        if arm.compiled is not None:
            self.progress.say(f"{arm.name:>10} {arm.compiled}; the first step takes minutes")
        if arm.run.train.native_kernels == "all":
            precision = arm.run.train.precision
            vain = "" if precision == "fp32" else f", in vain: they are fp32 alone, and train.precision={precision}"
            self.progress.say(f"{arm.name:>10} takes our kernels in C++ for attention and all MLPs{vain}")
        no_kernel = why_no_expert_kernel(arm)
        if no_kernel == "" and arm.run.train.native_kernels != "all":
            self.progress.say(f"{arm.name:>10} takes our kernel in C++ for experts")
        elif no_kernel and arm.device.type == "cpu":
            self.progress.say(f"{arm.name:>10} computes experts with torch's operators, not our kernel: {no_kernel}")
        self.records.write(
            "arm",
            arm=arm.name,
            seed=arm.run.seed,
            params_total=counts.total,
            params_active=counts.active,
            flops_per_image=counts.flops,
            train_flops_per_image=counts.train_flops,
            moe_layers=list(arm.raw.moe_layers()),
            num_experts=moe.num_experts if moe else 0,
            top_k=moe.top_k if moe else 0,
            dispatcher=taken,
            dispatcher_reason=reason or None,
            experts_in_kernel=None if no_kernel is None else not no_kernel,
            experts_in_kernel_reason=no_kernel or None,
            compiled=None if arm.compiled is None else dataclasses.asdict(arm.compiled),
            steps=arm.length.steps,
            config=to_tree(arm.run),
        )


def why_no_expert_kernel(arm: Arm) -> str | None:
    """Why the experts of `arm` do not take our kernel in C++; "" where they do, None where there are none."""
    layers = arm.raw.moe_layers()
    if not layers:
        return None
    experts = next(iter(layers.values())).experts  # of one kind in all layers
    train = arm.run.train
    if arm.device.type == "cpu" and train.native_kernels == "none":
        return "train.native_kernels=none"
    if arm.device.type == "cpu" and train.precision != "fp32":
        return f"it takes float32 alone, and train.precision={train.precision}"
    if not isinstance(experts, Experts):
        return "they compute in a way of their own"
    # Layers may have capacities of their own, and with that some may be compiled and others not.
    inside = 0 if arm.compiled is None else sum(name.rpartition(".")[0] in arm.compiled.whole for name in layers)
    if inside:
        return f"in {inside} of {len(layers)} layers they are part of a compiled graph"
    return experts.why_no_kernel()


def memory_tactics(arm: Arm, world: int) -> list[str]:
    """How an arm saves memory, in words, and what of it is in vain here."""
    said, run = [], arm.run
    recomputed = run.model.grad_checkpointing
    if recomputed is True:
        said.append("recomputing blocks")
    elif recomputed:
        said.append(f"recomputing blocks of stages {list(recomputed)}")
    if run.model.attention_chunks != 1:
        said.append(f"attention in chunks ({run.model.attention_chunks})")
    if run.train.offload_activations:
        said.append(
            "keeping activations on the host" + ("" if arm.device.type == "cuda" else ", where they are anyway")
        )
    alone = ", of no use on one process" if world == 1 else ""
    if run.parallel.zero:
        said.append(f"dealing out the optimiser's moments (ZeRO){alone}")
    if run.parallel.shard_dense:
        said.append(f"cutting dense parameters over ranks (FSDP2){alone}")
    return said


def make_stream(run: RunConfig, bundle: DataBundle, mesh: Mesh) -> TrainStream:
    """The training batches of `run` for this rank."""
    return TrainStream(
        bundle.train,
        data=run.data,
        batch_size=run.train.batch_size,
        accumulation=run.train.accumulation,
        rank=mesh.rank,
        world=mesh.world,
        seed=run.seed,
        num_classes=bundle.num_classes,
        label_smoothing=run.train.label_smoothing,
    )


def check_data_fits(run: RunConfig, bundle: DataBundle) -> None:
    """Model and data agree on channels, classes and size; `ConfigError` says which key to change."""
    if run.model.in_chans != bundle.channels:
        raise ConfigError(
            f"model.in_chans={run.model.in_chans} but {run.data.name} images have {bundle.channels} channels; set "
            f"model.in_chans={bundle.channels} or data.channels={run.model.in_chans}"
        )
    if run.model.num_classes < bundle.num_classes:
        raise ConfigError(
            f"model.num_classes={run.model.num_classes} but {run.data.name} has {bundle.num_classes} classes; set "
            f"model.num_classes={bundle.num_classes}"
        )
    if run.model.img_size != run.data.image_size:
        raise ConfigError(
            f"model.img_size={run.model.img_size} and data.image_size={run.data.image_size} differ; make them equal"
        )


@contextmanager
def open_session(
    command: str, run: RunConfig, *, config: Any, folder: Path, resume: str, show: bool
) -> Iterator[Session]:
    """Start (or join) the job: process group, folder, records. `config` is what the run record keeps whole.

    Raises:
        ConfigError: the folder is already used and `resume` is `never`, or the launcher restarts what would not resume.
        DistributedError: ranks were started with different configs or code, or see different output folders.
    """
    restarts = launched_restarts_allowed()
    if restarts and resume != "auto":
        raise ConfigError(
            f"the launcher may start this run again after a failure (--max-restarts {restarts}), but resume={resume} "
            "would not go on from its newest checkpoint; give resume=auto, or --max-restarts 0"
        )
    accelerator = make_accelerator(
        run.train.precision,
        tensorboard_dir=folder / "tensorboard" if run.log.tensorboard else None,
        timeout_minutes=run.parallel.timeout_minutes,
    )
    use_tf32(run.train.tf32)
    path = folder / "records.jsonl"
    used = path.exists()
    # Before groups are formed: ranks of different configs would wait for each other there.
    agree(
        {f"the config's {key}": value for key, value in _flat(to_tree(config))}
        | {f"the code's {key}": UNKNOWN if value is None else value for key, value in describe_code().items()}
        | {"whether the output folder holds a run": used}
    )
    mesh = make_mesh(run.parallel, run.model.moe.num_experts if run.model.moe else None)
    if used and resume == "never":
        raise ConfigError(
            f"output folder {str(folder)!r} already holds a run; use resume=auto to go on with it, or another name= or "
            "output_dir="
        )
    session = Session(
        command=command,
        config=config,
        run=run,
        folder=folder,
        resume=resume,
        accelerator=accelerator,
        mesh=mesh,
        records=RunRecord(path if mesh.rank == 0 else None),
        progress=Progress(show=show and mesh.rank == 0),
    )
    yield session
    # Only after success: a rank that failed must not wait for its peers here.
    if run.log.tensorboard:
        accelerator.end_training()
    stop_processes()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(`a.b`, value) for every leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
