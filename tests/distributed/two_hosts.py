"""Two hosts on one machine: network namespaces joined by a rate-limited pair of virtual Ethernet devices.

    with two_hosts(rate="1gbit") as hosts:
        outputs = hosts.torchrun("-m", "swinmoe.cli", "train", "config.yaml", per_host=2)

Each host has its own loopback and one device, `NAME`, that leads to the other through a token bucket in each direction.
Files are shared, as on a cluster. Needs root and the tools `ip` and `tc`: `why_not()` says what is missing.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAME = "wire0"
"""The device between the hosts, on both: what GLOO_SOCKET_IFNAME wants."""
ADDRESSES = ("10.77.0.1", "10.77.0.2")
BURST_KIB = 68
"""Little more than the kernel's largest segment (64 KiB), so that a message of any size worth timing meets the rate."""
_PORTS = itertools.count(29400)
"""Ports of a namespace are its own: no other job can have taken them."""


@dataclass(frozen=True)
class Output:
    """What a host's launcher printed, and how it ended."""

    status: int
    stdout: str
    stderr: str


@dataclass
class TwoHosts:
    """Made by `two_hosts`."""

    namespaces: tuple[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, host: int, command: Sequence[str], extra: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start `command` on host 0 or 1, with `extra` in its environment."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespaces[host], *command],
            cwd=ROOT,
            env=os.environ | {"GLOO_SOCKET_IFNAME": NAME, "OMP_NUM_THREADS": "1"} | dict(extra or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def both(
        self, commands: Sequence[Sequence[str]], extra: Mapping[str, str] | None = None, timeout: float = 300.0
    ) -> list[Output]:
        """Run one command on each host at the same time; `subprocess.TimeoutExpired` if one takes too long."""
        running = [self.start(host, command, extra) for host, command in enumerate(commands)]
        deadline = time.monotonic() + timeout
        outputs = []
        for process in running:
            out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            outputs.append(Output(process.returncode, out, err))
        return outputs

    def torchrun(
        self, *arguments: str, per_host: int = 1, extra: Mapping[str, str] | None = None, timeout: float = 300.0
    ) -> list[Output]:
        """A torchrun job of 2 x `per_host` processes. `arguments`: a script and its own, or `-m MODULE ...`."""
        port = next(_PORTS)
        return self.both(
            [
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(host)),
                    *("--nproc-per-node", str(per_host), "--local-addr", address),
                    *("--master-addr", ADDRESSES[0], "--master-port", str(port), *arguments),
                ]
                for host, address in enumerate(ADDRESSES)
            ],
            extra,
            timeout,
        )

    def launch(
        self, *arguments: str, per_host: int = 1, extra: Mapping[str, str] | None = None, timeout: float = 300.0
    ) -> list[Output]:
        """A swinmoe command of 2 x `per_host` processes, started by launch/torchrun.sh."""
        head = f"{ADDRESSES[0]}:{next(_PORTS)}"
        script = str(ROOT / "launch" / "torchrun.sh")
        return self.both(
            [
                [
                    *(script, "--nodes", "2", "--head", head, "--address", address),
                    *("--per-node", str(per_host), "--", *arguments),
                ]
                for address in ADDRESSES
            ],
            {"PYTHON": sys.executable} | dict(extra or {}),
            timeout,
        )


@contextmanager
def two_hosts(rate: str = "1gbit", burst_kib: int = BURST_KIB, latency: str = "50ms") -> Iterator[TwoHosts]:
    """Two namespaces joined at `rate`, in the words of tc's token bucket filter; gone afterwards, with what ran there.

    Args:
        rate: of the link, in each direction.
        burst_kib: what may pass at once, unlimited, after a pause.
        latency: longest that a packet may wait in the bucket's queue before it is dropped.
    """
    unique = f"{os.getpid():x}{time.time_ns() & 0xFFFFFF:x}"
    namespaces = (f"swinmoe-{unique}-a", f"swinmoe-{unique}-b")
    hosts = TwoHosts(namespaces)
    try:
        for namespace in namespaces:
            _run("ip", "netns", "add", namespace)
        first, second = namespaces
        # Made inside the first namespace: the machine's own devices are never touched.
        _run("ip", "-n", first, "link", "add", NAME, "type", "veth", "peer", "name", NAME, "netns", second)
        for namespace, address in zip(namespaces, ADDRESSES, strict=True):
            _run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", NAME)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
            _run("ip", "-n", namespace, "link", "set", NAME, "up")
            _run(
                *("tc", "-n", namespace, "qdisc", "add", "dev", NAME, "root"),
                *("tbf", "rate", rate, "burst", f"{burst_kib}kb", "latency", latency),
            )
        yield hosts
    finally:
        for process in hosts.started:
            _end(process)
        for namespace in namespaces:
            # What is left in there, such as workers whose launcher was killed.
            left = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
            for pid in left.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


@functools.cache
def why_not() -> str | None:
    """Why two hosts cannot be made on this machine, or None."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"no {tool!r} on this machine (package iproute2)"
    try:
        with two_hosts():
            return None
    except RuntimeError as error:
        return str(error)


def namespaces() -> set[str]:
    """Those that exist on this machine, by name."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line}


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {' '.join(done.stderr.split())}")
