"""What machine and code a run used, for its records. No host names, user names or paths."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from swinmoe.version import __version__

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "safetensors", "numpy")


def describe_environment() -> dict[str, Any]:
    """Versions, machine and commit as plain values that JSON can hold.

    Keys: swinmoe, python, one for each of `PACKAGES` (None = not installed), platform, cpu, cores, torch_threads,
    device, devices (visible GPUs), cuda, world_size, git_commit and git_dirty (None outside a checkout).
    """
    code = describe_code()
    gpus = torch.cuda.device_count()
    return {
        "swinmoe": code["swinmoe"],
        "python": code["python"],
        **{name: _version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if gpus else "cpu",
        "devices": gpus,
        "cuda": torch.version.cuda,
        "world_size": dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
        "git_commit": code["git_commit"],
        "git_dirty": code["git_dirty"],
    }


def describe_code() -> dict[str, Any]:
    """What code this is: versions of swinmoe, torch and Python, and the commit where there is one."""
    commit, dirty = _git_state()
    return {
        "swinmoe": __version__,
        "torch": _version("torch"),
        "python": platform.python_version(),
        "git_commit": commit,
        "git_dirty": dirty,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _usable_cores() -> int:
    """Cores this process may run on: fewer than the machine's in a container or a batch job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _git_state() -> tuple[str | None, bool | None]:
    """Commit and whether tracked files differ from it, if this very file is under version control."""
    if not _git("ls-files", "--error-unmatch", Path(__file__).name):
        return None, None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return _git("rev-parse", "HEAD"), None if changes is None else bool(changes)
