"""How long a sparse checkpoint takes to write and read, against torch.save/torch.load and a plain copy; memory; bytes.

python tests/integration/measure_checkpoint.py [--gigabytes 1] [--rounds 7] [--folder DIR]

Every round runs every way once, in turn, in one process; medians are compared. Files are read from the page cache.
Peak memory is the process's resident set (VmHWM), each way in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from swinmoe import MoEConfig, MoEMlp
from swinmoe.checkpoint import Content, Held, Saver, Stack, hold, open_checkpoint, read_held, stacks
from swinmoe.parallel import Mesh

EXPERTS, DIM, HIDDEN = 16, 512, 2048
GROUPS = ("model", "optimizer")
State = dict[str, dict[str, Tensor]]


def make(gigabytes: float) -> tuple[nn.Module, State]:
    """Expert layers and AdamW's moments for them, together about `gigabytes`."""
    per_layer = EXPERTS * 2 * DIM * HIDDEN * 4 * 3
    layers = max(1, round(gigabytes * 1e9 / per_layer))
    cfg = MoEConfig(num_experts=EXPERTS)
    model = nn.Sequential(*(MoEMlp(cfg, dim=DIM, hidden_dim=HIDDEN, name=str(n)) for n in range(layers)))
    moments = {
        f"{name}#{key}": torch.randn_like(parameter)
        for name, parameter in model.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
    }
    return model, {"model": dict(model.state_dict()), "optimizer": moments}


def nbytes(state: State) -> int:
    """Size of all tensors."""
    return sum(tensor.nbytes for group in state.values() for tensor in group.values())


def content(model: nn.Module, state: State) -> Content:
    """What the store is given."""
    found = stacks(model)
    return Content({group: hold(tensors, found) for group, tensors in state.items()}, "{}\n")


def save(folder: Path, model: nn.Module, state: State, asynchronous: bool = False) -> Saver:
    """Ours."""
    saver = Saver(folder, Mesh(), keep_last=1, asynchronous=asynchronous)
    saver.save(1, {"a": content(model, state)}, {}, None)
    return saver


def load(folder: Path, model: nn.Module, state: State) -> None:
    """Ours, into tensors that exist, all of them checked."""
    stored, found = open_checkpoint(folder / "step-00000001"), stacks(model)
    for group in GROUPS:
        source = stored.tensors(group)
        read_held(hold(state[group], found), source, Mesh())
        source.settle()


def synced(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def torch_save(path: Path, state: State, sync: bool) -> None:
    torch.save(state, path)
    if sync:
        synced(path)


def torch_load(path: Path, state: State) -> None:
    """Into tensors that exist, as a training program does."""
    loaded = torch.load(path, weights_only=True)
    for group, tensors in state.items():
        for name, tensor in tensors.items():
            tensor.copy_(loaded[group][name])


def copy(source: Path, target: Path, sync: bool) -> None:
    shutil.copyfile(source, target)
    if sync:
        synced(target)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def times(folder: Path, model: nn.Module, state: State, rounds: int) -> None:
    """Print the medians of all ways, and their ratios."""
    theirs, copied = folder / "torch.pt", folder / "copy"
    torch_save(theirs, state, sync=False)
    ways: dict[str, Callable[[], object]] = {
        "save": lambda: save(folder / "ours", model, state),
        "torch.save": lambda: torch_save(theirs, state, sync=False),
        "torch.save, fsync": lambda: torch_save(theirs, state, sync=True),
        "copy": lambda: copy(theirs, copied, sync=False),
        "copy, fsync": lambda: copy(theirs, copied, sync=True),
        "load": lambda: load(folder / "ours", model, state),
        "torch.load": lambda: torch_load(theirs, state),
        "torch.load alone": lambda: torch.load(theirs, weights_only=True),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    stalls = []
    for _ in range(rounds):
        for name, work in ways.items():
            if name == "save":
                shutil.rmtree(folder / "ours", ignore_errors=True)
            taken[name].append(timed(work))
    waiting = Saver(folder / "background", Mesh(), keep_last=1, asynchronous=True)
    for step in range(1, rounds + 1):
        stalls.append(timed(lambda step=step: waiting.save(step, {"a": content(model, state)}, {}, None)))  # type: ignore[misc]
        waiting.finish()
    clones = [timed(lambda: [t.clone() for g in state.values() for t in g.values()]) for _ in range(rounds)]
    median = {name: statistics.median(values) for name, values in taken.items()}
    size = nbytes(state) / 1e9
    print(f"{size:.2f} GB in {sum(map(len, state.values()))} tensors, {rounds} rounds, medians")
    for name, value in median.items():
        print(f"  {name:18} {value:6.2f} s  {size / value:5.2f} GB/s  all: {' '.join(f'{t:.2f}' for t in taken[name])}")
    for ours, others in (
        ("save", ("torch.save", "torch.save, fsync", "copy", "copy, fsync")),
        ("load", ("torch.load", "copy")),
    ):
        for other in others:
            print(f"  {ours} / {other}: {median[ours] / median[other]:.2f}")
    print(
        f"  asynchronous save keeps the step for {statistics.median(stalls):.2f} s (first {stalls[0]:.2f}); "
        f"cloning all tensors takes {statistics.median(clones):.2f} s"
    )


def status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak(work: Callable[[], object]) -> int:
    """How far the resident set rose above where it was."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def rise(folder: Path, what: str, gigabytes: float) -> float:
    """Peak of one way, over the size of the state."""
    torch.set_num_threads(1)
    model, state = make(gigabytes)
    size = nbytes(state)
    if what == "load":
        save(folder / "memory", model, state)
        return (size + peak(lambda: load(folder / "memory", model, state))) / size
    return (size + peak(lambda: save(folder / "memory", model, state, what != "save").finish())) / size


def memory(folder: Path, gigabytes: float) -> None:
    """Print the peaks of all ways, in processes of their own."""
    for what in ("save", "asynchronous save", "load"):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            print(f"  peak of {what}: {rise(folder, what, gigabytes):.3f} x the state", flush=True)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def bytes_of_a_share(folder: Path, model: nn.Module, state: State) -> None:
    """Print what one of four expert-parallel ranks reads."""
    save(folder / "shares", model, state).finish()
    for rank in range(4):
        mesh = Mesh(rank=rank, world=4, ep_size=4, ep_rank=rank)
        stored = open_checkpoint(folder / "shares" / "step-00000001")
        own, read, found = 0, 0, stacks(model)
        before = _read_by_process()
        for group in GROUPS:
            held = {}
            for name, tensor in state[group].items():
                stack = found.get(name.partition("#")[0])
                part = tensor if stack is None else torch.empty_like(tensor.chunk(4)[rank])
                held[name] = Held(part, None if stack is None else Stack(stack.num_experts, spread=True))
                own += part.nbytes
            source = stored.tensors(group)
            read_held(held, source, mesh)
            source.settle()
            read += source.bytes_read
        print(
            f"  rank {rank} of 4 holds {own / 1e6:.2f} of {nbytes(state) / 1e6:.2f} MB and reads {read / 1e6:.2f} MB: "
            f"{read / own:.4f} x (the system counts {(_read_by_process() - before) / 1e6:.2f} MB with the manifest)"
        )


def _read_by_process() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        folder = Path(scratch)
        memory(folder, given.gigabytes)
        model, state = make(given.gigabytes)
        times(folder, model, state, given.rounds)
        bytes_of_a_share(folder, model, state)


if __name__ == "__main__":
    main()
