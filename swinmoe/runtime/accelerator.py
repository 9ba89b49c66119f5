"""Makes the Accelerator: the only file that imports accelerate."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from swinmoe.errors import BackendUnavailableError, ConfigError
from swinmoe.runtime.processes import TIMEOUT_MINUTES, start_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

AUTOCAST = {"fp32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}
"""A run's precision -> Accelerate's word for its autocast. fp64 is a matter of the weights' type; nothing is cast."""


def wants_cpu(cpu: bool = False) -> bool:
    """True if the run belongs on the CPU: asked for here or by `accelerate launch --cpu`, or there is no GPU."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").strip().lower() in {"1", "true", "yes", "y", "on"}
    return cpu or asked or not torch.cuda.is_available()


def make_accelerator(
    precision: str = "fp32",
    tensorboard_dir: Path | str | None = None,
    *,
    cpu: bool = False,
    timeout_minutes: float = TIMEOUT_MINUTES,
) -> Accelerator:
    """The Accelerator of this process; joins the job's process group if a launcher started several.

    It places models on their device, wraps them in autocast and DDP (`swinmoe.parallel.wrap_data_parallel` completes
    that) and feeds trackers. Its gradient scaler, accumulation counter and scheduler wrapper assume one model, and its
    loaders cannot give each rank its own draw-by-draw reproducible share: those are ours.

    Args:
        precision: `fp32`, `bf16`, `fp16` (GPU only) or `fp64`.
        tensorboard_dir: where TensorBoard's files go; None = no tracker. Start it with `init_trackers`.
        cpu: stay on the CPU where there is a GPU.
        timeout_minutes: after so long a collective that does not finish is an error.

    Raises:
        ConfigError: an unknown precision, fp16 on the CPU, or a launcher that asks for FSDP or DeepSpeed.
        BackendUnavailableError: TensorBoard is not installed.
        DistributedError: the processes could not join.
    """
    if precision not in AUTOCAST:
        raise ConfigError(f"train.precision={precision!r} is unknown; use one of {list(AUTOCAST)}")
    on_cpu = wants_cpu(cpu)
    if precision == "fp16" and on_cpu:
        raise ConfigError("train.precision=fp16 needs a GPU; on the CPU use bf16 or fp32")
    if tensorboard_dir is not None and importlib.util.find_spec("tensorboard") is None:
        raise BackendUnavailableError(
            "log.tensorboard=true but TensorBoard is not installed; install swinmoe[tensorboard], or set "
            "log.tensorboard=false (records.jsonl is written either way)"
        )
    # Imported here: it takes seconds, and most of swinmoe works without it.
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType

    start_processes(cpu=on_cpu, timeout_minutes=timeout_minutes)
    # Accelerate keeps one state per process and refuses a second precision; runs in one process follow each other.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=AUTOCAST[precision],
        log_with=None if tensorboard_dir is None else "tensorboard",
        project_dir=None if tensorboard_dir is None else str(tensorboard_dir),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in known:
        raise ConfigError(
            f"accelerate was configured for {accelerator.distributed_type.value}; swinmoe spreads experts itself and "
            "runs under plain data parallelism: use a file of launch/accelerate/"
        )
    return accelerator
