"""Training jobs killed again and again, and checkpoints spoilt in every way: harness and table.

python tests/integration/crashes.py KILLS CORRUPTIONS [KILLS_OF_TWO]     e.g. 500 1000 100; prints what happened

Half of the kills come from a clock, at any moment of starting, training and saving; half strike inside a save, between
two of its file operations or in the middle of a write. Processes are forked from this one, which has imported all.
KILLS_OF_TWO of the kills hit jobs of two gloo processes that share the experts: one is struck as above, and the other,
which may be writing its own files, is killed a moment later, as a launcher would.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pickle
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from swinmoe import from_pretrained
from swinmoe.checkpoint import latest_checkpoint, load_checkpoint, read_model
from swinmoe.checkpoint.naming import to_files
from swinmoe.checkpoint.tensor_file import TensorFile
from swinmoe.config import RunConfig
from swinmoe.config.io import build, merge
from swinmoe.errors import CheckpointError, CollectiveError
from swinmoe.records import read_records
from swinmoe.train import train

STEPS, EVERY = 16, 2
RUN = {
    "name": "run",
    "model": {
        "preset": "swin_moe_micro",
        "in_chans": 1,
        "embed_dim": 8,
        "patch_size": 4,
        "num_heads": [1, 2],
        "drop_path_rate": 0.1,
        "moe": {"num_experts": 4, "router": {"noise": 1.0}},
    },
    "data": {"name": "digits", "limit": 64, "augment": {"crop_padding": 2}},
    "optim": {"base_lr": 0.003},
    "train": {
        "steps": STEPS,
        "epochs": None,
        "batch_size": 16,
        "eval_batch_size": 400,
        "eval_every_epochs": 2,
        "ema_decay": 0.9,
    },
    "checkpoint": {"every_steps": EVERY, "every_epochs": 0, "keep_last": 2, "keep_best": 1},
    "log": {"every_steps": 1, "peak_flops": 1e11},
}
TIMED = ("seconds", "images_per_second", "data_wait", "mfu", "peak_memory_bytes")


def run_config(folder: Path, **over: Any) -> RunConfig:
    """The job's config, saving into `folder`."""
    return build(RunConfig, merge(RUN | {"output_dir": str(folder)}, over))


def forked(work: Callable[[], None]) -> int:
    """Start `work` in a fork of this process; its number. It ends with status 0, or 1 after a traceback."""
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except CollectiveError as error:  # its peer was killed
        print(error, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(child: int, seconds: float | None = None) -> int | None:
    """The child's exit status, negative for a signal; after `seconds` it is killed, None if that was in time.

    With it go its own children, if it leads a group (`job`).
    """
    if seconds is None:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    (os.killpg if os.getpgid(child) == child else os.kill)(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def die_in_save(operation: int) -> None:
    """Let this process be killed at its `operation`-th file operation of saving, half way through it if it writes."""
    seen = 0

    def counted(original: Callable[..., Any], writes: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == operation:
                if writes:
                    handle, data, offset = arguments
                    original(handle, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    os.pwrite = counted(os.pwrite, True)  # type: ignore[assignment]
    os.fsync = counted(os.fsync, False)  # type: ignore[assignment]
    Path.rename = counted(Path.rename, False)  # type: ignore[method-assign]
    Path.mkdir = counted(Path.mkdir, False)  # type: ignore[method-assign]
    shutil.rmtree = counted(shutil.rmtree, False)  # type: ignore[assignment]


def curve(folder: Path) -> list[str]:
    """What the records that count say, without what a clock has to do with."""
    lines = [
        line for line in read_records(folder / "run" / "records.jsonl") if line["kind"] in ("step", "eval", "final")
    ]
    return [json.dumps({k: v for k, v in line.items() if k not in TIMED}, sort_keys=True) for line in lines]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint."""
    newest = latest_checkpoint(folder / "run" / "checkpoints")
    assert newest is not None
    groups = load_checkpoint(newest).tensors
    return {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}


@dataclass
class Outcome:
    """What the kills did."""

    kills: int = 0
    in_saves: int = 0
    """Of these, struck at a file operation of a save."""
    found: Counter[str] = field(default_factory=Counter)
    """State of the checkpoints' folder after a kill."""
    runs: int = 0
    """Runs that came to their end, each after many kills, with the curve and the tensors of the undisturbed one."""
    seconds: float = 0.0


def kill_again_and_again(folder: Path, kills: int, processes: int = 1, seed: int = 0) -> Outcome:
    """Kill training `kills` times; hold every newest checkpoint, and every finished run, against the truth."""
    draw, outcome, began = random.Random(seed), Outcome(), time.monotonic()
    if not kills:
        return outcome
    parallel = {"parallel": {"ep_size": processes}}
    truth = folder / "truth"
    assert ended(job(run_config(truth, **parallel), processes)) == 0
    lines, final = curve(truth), tensors(truth)
    timed = time.monotonic()
    assert ended(job(run_config(folder / "timing", **parallel), processes)) == 0
    whole = time.monotonic() - timed
    while outcome.kills < kills:
        place = folder / f"run-{outcome.runs}"
        asynchronous = outcome.runs % 2 == 1
        config = run_config(place, resume="auto", checkpoint={"asynchronous": asynchronous}, **parallel)
        newest = 0
        while True:
            in_save = draw.random() < 0.5 and outcome.kills < kills
            operation, seconds = draw.randrange(1, 2000 // processes), draw.uniform(0.02, 0.9) * whole
            started = job(config, processes, draw.randrange(processes), operation if in_save else 0, draw.random() / 10)
            status = ended(started, seconds if not in_save and outcome.kills < kills else None)
            if status == 0:
                break
            assert status in (None, -signal.SIGKILL), status
            outcome.kills += 1
            outcome.in_saves += in_save
            newest = _check_after_kill(place, newest, outcome)
        assert curve(place) == lines, "the curve is another"
        own = tensors(place)
        assert own.keys() == final.keys() and all(torch.equal(own[name], final[name]) for name in final)
        outcome.runs += 1
        shutil.rmtree(place)
    outcome.seconds = time.monotonic() - began
    return outcome


def job(config: RunConfig, processes: int, struck: int = 0, operation: int = 0, later: float = 0.0) -> int:
    """Start training in forks of this process; the number of one that ends as they do.

    Args:
        config: of the run.
        processes: gloo ranks; 1 = none.
        struck: the rank that dies at its `operation`-th file operation of saving, 0 = none does.
        operation: see there.
        later: seconds after which the other ranks are killed too, when one is.
    """

    def rank_of(rank: int) -> Callable[[], None]:
        def work() -> None:
            if operation and rank == struck:
                die_in_save(operation)
            train_quietly(config)

        return work

    if processes == 1:
        return forked(rank_of(0))
    return forked(lambda: _launch([rank_of(rank) for rank in range(processes)], 0.01 + later))


def _launch(ranks: list[Callable[[], None]], later: float) -> None:
    """A launcher: ends well when all ranks have; when one is killed, the others and it are too, `later`."""
    os.setsid()  # a clock's kill reaches all of them
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": len(ranks), "LOCAL_WORLD_SIZE": len(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    left = {}
    for rank, work in enumerate(ranks):
        os.environ.update({key: str(value) for key, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()})
        left[forked(work)] = rank
    statuses: list[int] = []

    def look() -> None:
        for child in list(left):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                del left[child]
                statuses.append(os.waitstatus_to_exitcode(status))

    while left and not any(statuses):
        look()
        time.sleep(0.001)
    if not any(statuses):
        return
    time.sleep(later)
    look()  # a rank that fails because another was killed may be seen first
    if -signal.SIGKILL in statuses:
        os.killpg(os.getpid(), signal.SIGKILL)
    for child in left:
        os.kill(child, signal.SIGKILL)
    raise SystemExit(f"ranks ended with {statuses}")


def _check_after_kill(place: Path, newest: int, outcome: Outcome) -> int:
    """The newest complete checkpoint is sound, and no older than the one before; its step."""
    folder = place / "run" / "checkpoints"
    found = latest_checkpoint(folder)
    if found is None:
        assert newest == 0, f"the checkpoint of step {newest} is gone"
        outcome.found["none yet"] += 1
        return 0
    step = load_checkpoint(found).step  # checks every byte
    assert step >= newest, f"after step {newest} the newest is of step {step}"
    names = [path.name for path in folder.iterdir()]
    half = any(name.startswith(".writing-step") for name in names)
    outcome.found["one half written beside it" if half else "nothing half written"] += 1
    return step


def train_quietly(config: RunConfig) -> None:
    """`train` in a fork: one thread, no garbage of the parent's."""
    torch.set_num_threads(1)
    gc.disable()
    train(config, show=False)


# ------------------------------------------------------------------------------------------------------------- spoiling


class Booby:
    """A pickle of this leaves a mark where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def spoil(checkpoint: Path, kind: str, draw: random.Random, mark: Path) -> list[str]:
    """Damage a checkpoint; names of files, or of tensors where their data was hit, of which one must be named."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    file = draw.choice(files)
    data = file.read_bytes()
    if kind == "cut off":
        file.write_bytes(data[: draw.randrange(len(data))])
    elif kind == "a bit flipped":
        at = draw.randrange(len(data))
        named = _tensors_at(file, at, at + 1)
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :])
        return named or [file.name]
    elif kind == "a page of zeros":
        spoilt = bytearray(data)
        at = draw.randrange(len(data))
        spoilt[at : at + 4096] = bytes(len(spoilt[at : at + 4096]))
        if bytes(spoilt) == data:  # zeros already
            spoilt[at] = 255
        changed = [i for i in range(at, min(at + 4096, len(data))) if spoilt[i] != data[i]]
        named = _tensors_at(file, changed[0], changed[-1] + 1)
        file.write_bytes(spoilt)
        return named or [file.name]
    elif kind == "bytes added":
        file.write_bytes(data + draw.randbytes(draw.randrange(1, 64)))
    elif kind == "missing":
        file.unlink()
    elif kind == "two swapped":
        shards = [path for path in files if path.suffix == ".safetensors"]
        one, two = draw.sample(shards, 2)
        held = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(held)
        return [one.name, two.name]
    elif kind == "another config":
        file = draw.choice([path for path in files if path.name == "config.yaml"])
        file.write_bytes(file.read_bytes().replace(b"base_lr: 0.003", b"base_lr: 0.004"))
    else:
        assert kind == "a pickle renamed"
        file.write_bytes(pickle.dumps({"model": Booby(mark)}))
    return [file.name]


def _tensors_at(file: Path, start: int, end: int) -> list[str]:
    """Names of the tensors in these bytes of a sound file; none if it is of another kind, or its header is hit."""
    if file.suffix != ".safetensors":
        return []
    entries = TensorFile(file).entries
    if start < min(entry.start for entry in entries.values()):
        return []
    return [repr(name) for name, e in entries.items() if e.start < end and start < e.start + e.nbytes]


KINDS = (
    "cut off",
    "a bit flipped",
    "a page of zeros",
    "bytes added",
    "missing",
    "two swapped",
    "another config",
    "a pickle renamed",
)


def corrupt_again_and_again(folder: Path, times: int, seed: int = 0) -> Counter[str]:
    """Damage a checkpoint `times` times and load it: always refused by the name of file or tensor, nothing run. Counts
    by kind.

    Whoever wants the model alone is refused too, or gets the sound one, if what is spoilt is no part of it. Of every
    kind one in ten times `resume=auto` has to fall back to the checkpoint before it.
    """
    draw, counts, mark = random.Random(seed), Counter[str](), folder / "mark"
    if not times:
        return counts
    config = run_config(folder, train={"steps": 4, "eval_every_epochs": None}, checkpoint={"keep_best": 0})

    def prepare() -> None:
        from swinmoe.checkpoint import spread

        spread.SHARD_BYTES = 60_000
        train_quietly(config)

    assert ended(forked(prepare)) == 0
    sound = folder / "sound"
    shutil.move(folder / "run" / "checkpoints", sound)
    assert len(list((sound / "step-00000004").glob("model-*.safetensors"))) > 1
    model = load_checkpoint(sound / "step-00000004").tensors["model"]
    for number in range(times):
        kind = KINDS[number % len(KINDS)]
        spoilt = folder / "run" / "checkpoints"
        shutil.rmtree(spoilt, ignore_errors=True)
        shutil.copytree(sound, spoilt)
        culprits = spoil(spoilt / "step-00000004", kind, draw, mark)
        try:
            load_checkpoint(spoilt / "step-00000004")
        except CheckpointError as error:
            assert any(name in str(error) for name in culprits), f"{kind}: {error} does not name {culprits}"
        else:
            raise AssertionError(f"{kind} of {culprits} was not noticed")
        counts["models refused"] += _model_is_sound_or_refused(spoilt / "step-00000004", model, culprits, kind)
        assert not mark.exists(), f"{kind}: the pickle was run"
        counts[kind] += 1
        if number // len(KINDS) % 10 == 0:
            resumed = run_config(
                folder, resume="auto", train={"steps": 4, "eval_every_epochs": None}, checkpoint={"keep_best": 0}
            )
            assert ended(forked(lambda config=resumed: train_quietly(config))) == 0  # type: ignore[misc]
            assert load_checkpoint(spoilt / "step-00000004").step == 4  # trained again from step 2
            assert (spoilt / "damaged-step-00000004").is_dir(), kind
            assert not mark.exists(), f"{kind}: the pickle was run"
            counts["fell back"] += 1
    return counts


def _model_is_sound_or_refused(path: Path, model: dict[str, torch.Tensor], culprits: list[str], kind: str) -> bool:
    """Look for weights in a spoilt checkpoint, both ways; True if they were refused both times or once."""
    refused = False
    try:
        weights = read_model(path)
        assert weights.keys() == model.keys() and all(torch.equal(weights[name], model[name]) for name in model), kind
    except CheckpointError as error:
        assert any(name in str(error) for name in culprits), f"{kind}: {error} does not name {culprits}"
        refused = True
    try:
        own = to_files(from_pretrained(path).state_dict())
        assert all(torch.equal(own[name], tensor) for name, tensor in model.items()), kind
    except CheckpointError as error:
        assert any(name in str(error) for name in culprits), f"{kind}: {error} does not name {culprits}"
        refused = True
    return refused


def _main() -> None:
    kills, corruptions, of_two = (int(word) for word in [*sys.argv[1:4], 0][:3])
    # What a run would import late: forks find it here.
    for module in ("accelerate", "torch._dynamo", "sklearn.datasets", "timm.data"):
        importlib.import_module(module)
    torch.set_num_threads(1)
    for times, processes in ((kills, 1), (of_two, 2)):
        with tempfile.TemporaryDirectory() as scratch:
            outcome = kill_again_and_again(Path(scratch), times, processes)
        print(
            f"{outcome.kills} kills of {processes} process{'es' * (processes > 1)}, {outcome.in_saves} of them at a "
            f"file operation of a save, {outcome.runs} runs finished with the undisturbed curve, "
            f"{outcome.seconds:.0f} s; after the kills: {dict(outcome.found)}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        counts = corrupt_again_and_again(Path(scratch), corruptions)
        print(f"{corruptions} corruptions, all refused: {dict(counts)}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    _main()
