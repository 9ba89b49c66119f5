"""Kernels in C++, compiled where they run: what `torch.compile` asks of a machine anyway, a C++ compiler.

The text of this folder has no headers but its own and the system's, so that it compiles in two seconds. What came
of it lies in the user's cache, under a name made of all that it depends on: the text, the compiler, the processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from swinmoe.errors import BackendUnavailableError

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
_SECONDS = 300
"""That a compiler gets."""
_LEAST_LANES = 8
"""Numbers in a vector of the processor, AVX's: with narrower ones nobody has seen experts' kernel gain."""


def compiler() -> str | None:
    """The C++ compiler that is used: that which CXX names, or the first of the usual ones; None if it is not there."""
    return next(filter(None, map(shutil.which, _names())), None)


def no_compiler() -> str:
    """That there is none, in words to go on with."""
    named = os.environ.get("CXX")
    return f"CXX names {named!r}, which is not installed" if named else f"neither {' nor '.join(_names())} is installed"


def _names() -> list[str]:
    named = os.environ.get("CXX")
    return [named] if named else ["g++", "clang++"]


@functools.cache
def kernels() -> ctypes.CDLL:
    """The functions of this folder, compiled now if they were not.

    Raises:
        BackendUnavailableError: there is no compiler, or it could not; says what it said.
    """
    found = compiler()
    if found is None:
        raise BackendUnavailableError(
            f"our kernels need a C++ compiler, and {no_compiler()}; install one, or name yours in CXX"
        )
    try:
        path = _folder() / f"kernels-{_key(found)}.so"
        if not path.exists():
            _compile(found, path)
    except (OSError, subprocess.SubprocessError) as error:
        raise BackendUnavailableError(f"{found} does not compile our kernels: {error}") from error
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailableError(f"{path} does not load: {error}; delete it to have it made again") from error


@functools.cache
def why_no_kernels() -> str:
    """Why expert layers, which take kernels unasked, cannot have them here, or would not gain by it; "" if they should:
    tried once, and then known."""
    try:
        lanes = int(kernels().swinmoe_lanes())
    except BackendUnavailableError as error:
        return str(error)
    return "" if lanes >= _LEAST_LANES else f"nobody has seen it gain with vectors of {lanes} numbers"


def _compile(compiler: str, path: Path) -> None:
    """Make `path`, whole or not at all: several processes may do so at once."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fresh = Path(folder) / path.name
        words = [compiler, *_FLAGS, *map(str, _texts(".cpp")), "-o", str(fresh)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode:
            said = "\n".join(done.stderr.strip().splitlines()[:5])
            raise BackendUnavailableError(f"{compiler} does not compile our kernels: {said}")
        fresh.replace(path)


def _texts(*endings: str) -> list[Path]:
    return sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in endings)


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS).stdout
    told = [path.read_text("utf-8") for path in _texts(".cpp", ".h")]
    told += [" ".join(_FLAGS), compiler, version, platform.machine(), _processor()]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` depends on: a home may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


@functools.cache
def _folder() -> Path:
    """Where compiled files lie: the user's cache, or, where that is not theirs alone to write to, a folder of this
    process."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swinmoe"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        told = cache.stat()
        if told.st_uid == os.getuid() and not told.st_mode & 0o022 and os.access(cache, os.W_OK):
            return cache
    except (OSError, RuntimeError):  # the latter where nobody knows a home
        pass
    _OF_THIS_PROCESS.append(tempfile.TemporaryDirectory(prefix="swinmoe-"))
    return Path(_OF_THIS_PROCESS[-1].name)


_OF_THIS_PROCESS: list[tempfile.TemporaryDirectory[str]] = []
"""Held, so that they are removed when the process ends."""
