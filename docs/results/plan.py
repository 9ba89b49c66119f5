"""`swinmoe plan` held to account: on this machine, and on published figures.

    python docs/results/plan.py run --out runs/plan                 # measures; resumable; some 30 idle minutes
    python docs/results/plan.py page --out runs/plan --page docs/results/DATE-plan.md

`run` calibrates by `swinmoe plan --calibrate` on 4 processes and by `swinmoe profile model` on some configs, and
measures others, on 1, 2 and 4 processes of one thread each. `page` scales the calibrated figures by the first and
predicts the others, which took no part in it: the error allowed is 10 %, or twice the spread between three runs of the
same measurement. Then tables 2 and 7 of the Tutel paper (`swinmoe.profiling.plan.published`), and the memory of Swin
V2-G.
`--quick` measures three rounds of everything once: a check that says nothing about errors.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from swinmoe.config import RunConfig
from swinmoe.config.io import load
from swinmoe.profiling.plan.hardware import load_hardware
from swinmoe.profiling.plan.predict import Scene, at_batch, predict
from swinmoe.profiling.plan.published.tutel import compare, lines
from swinmoe.profiling.plan.refine import Measured, refine
from swinmoe.records import read_records

ROOT = Path(__file__).parents[2]
PROCESSES = (1, 2, 4)
COMMON = ("train.precision=fp32", "schedule.warmup_epochs=0", "train.accumulation=1")
ALLOWED = 0.10
DIGITS, SPARSE, V2, TOP2, FASHION = (
    f"configs/{name}.yaml"
    for name in (
        "debug/digits_swin_moe",
        "debug/digits_sparse_v1",
        "debug/digits_dense_v2",
        "debug/digits_top2",
        "pretrain/fashion_mnist",
    )
)


@dataclass(frozen=True)
class Case:
    """One measured step."""

    config: str
    words: tuple[str, ...]
    processes: int
    held: bool
    """Predicted; else it calibrates."""

    @property
    def name(self) -> str:
        """A folder's name."""
        words = "-".join(word.replace("=", "") for word in self.words)
        return f"{Path(self.config).stem}-{words}-on{self.processes}"

    @property
    def run(self) -> RunConfig:
        """The config that is measured."""
        return load(RunConfig, ROOT / self.config, (*self.words, *COMMON))


def cases() -> Iterator[Case]:
    """What calibrates, and what is predicted: other models, batches and ways to spread them."""
    for n in PROCESSES:
        ep = f"parallel.ep_size={n}"
        for config, batch in ((DIGITS, 64), (DIGITS, 512), (V2, 128), (SPARSE, 128)):
            spread = () if config == V2 else (ep,)
            yield Case(config, (f"train.batch_size={batch}", *spread), n, held=False)
        for config, batch in ((TOP2, 128), (FASHION, 128), (SPARSE, 384)):
            yield Case(config, (f"train.batch_size={batch}", ep), n, held=True)
        if n > 1:
            yield Case(DIGITS, ("train.batch_size=256", ep, f"parallel.weight_group={n}"), n, held=True)
            yield Case(DIGITS, ("train.batch_size=256", "parallel.ep_size=1"), n, held=True)
    # Measured when the model's counts had been settled, as the others had not
    for config, batch, n in ((DIGITS, 256, 1), (FASHION, 256, 1), (FASHION, 64, 2), (TOP2, 384, 2), (TOP2, 384, 4)):
        yield Case(config, (f"train.batch_size={batch}", f"parallel.ep_size={n}"), n, held=True)


def measure(out: Path, quick: bool) -> None:
    """Everything that is not there yet, one after the other."""
    rounds = "3" if quick else "15"
    machine = out / "hardware.yaml"
    out.mkdir(parents=True, exist_ok=True)
    if not machine.exists():
        say(f"calibrating on {PROCESSES[-1]} processes")
        command("plan", "--calibrate", str(machine), "--processes", str(PROCESSES[-1]), "--rounds", rounds)
    # All of them, and then again: what the machine does meanwhile shows in the spread, and spares nobody.
    for repeat in range(1 if quick else 3):
        for case in cases():
            folder = out / f"{case.name}.{repeat}"
            if not (folder / "done").exists():
                say(folder.name)
                spread(case, folder, rounds)
                (folder / "done").touch()


def spread(case: Case, folder: Path, rounds: str) -> None:
    """`swinmoe profile model` under torchrun, or by itself."""
    words = ("profile", "model", case.config, *case.words, *COMMON, "--rounds", rounds, "--threads", "1")
    if (folder / "records.jsonl").exists():  # cut off: measured anew
        (folder / "records.jsonl").unlink()
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.processes}")
    alone = case.processes == 1
    start((*(() if alone else launcher), "-m", "swinmoe.cli", *words, "--out", str(folder)))


def command(*words: str) -> None:
    start(("-m", "swinmoe.cli", *words))


def start(words: tuple[str, ...]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{done.stderr}")


def say(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


def seconds(out: Path, case: Case) -> list[float]:
    """Medians of the case's step with balance forced, where there is any to force; one of each repetition."""
    found = []
    for folder in sorted(out.glob(f"{case.name}.[0-9]")):
        steps = [line for line in read_records(folder / "records.jsonl") if line["kind"] == "measurement"]
        line = next(s for s in steps if not s["name"].endswith("dense twin"))
        found.append((line["balanced_ms"] or line["ms"]["median"]) / 1000)
    return found


def page(out: Path, target: Path) -> None:
    """Write the page from what `measure` left."""
    known = load_hardware(str(out / "hardware.yaml"))
    measured = {case: seconds(out, case) for case in cases()}
    steps = [Measured(c.run, c.processes, statistics.mean(t)) for c, t in measured.items() if not c.held]
    hardware, factors = refine(known, steps)
    rows, within = [], []
    for case, times in measured.items():
        mean = statistics.mean(times)
        spread = (max(times) - min(times)) / mean
        planned = predict(case.run, Scene(hardware, case.processes, imbalance=1.0)).seconds
        error, allowed = planned / mean - 1, max(ALLOWED, 2 * spread)
        if case.held:
            within.append(abs(error) <= allowed)
        verdict = "calibrates" if not case.held else "yes" if abs(error) <= allowed else "NO"
        what = f"{Path(case.config).stem} {' '.join(case.words)}"
        rows.append(
            f"| {case.processes} | {what} | {1000 * mean:.1f} | {100 * spread:.1f} % | {1000 * planned:.1f} | "
            f"{100 * error:+.1f} % | {verdict} |"
        )
    text = [
        "# The planner, held to account",
        f"{datetime.now(UTC):%Y-%m-%d}, {known.name}.",
        "",
        "```sh",
        "python docs/results/plan.py run --out runs/plan",
        f"python docs/results/plan.py page --out runs/plan --page {target.as_posix()}",
        "```",
        "",
        "## On this machine",
        "Training steps of one thread a process, balance forced, medians; spread between three runs. Configs that",
        f"calibrate took part in fitting {len(factors)} factors, the others did not. Error allowed: "
        f"{100 * ALLOWED:.0f} %, or twice the spread. {sum(within)} of {len(within)} are within it.",
        "",
        "| processes | config | measured ms | spread | predicted ms | error | within |",
        "|---:|---|---:|---:|---:|---:|---|",
        *sorted(rows, key=lambda row: "calibrates" in row),
        "",
        "Factors over operators timed alone: "
        + ", ".join(f"{name} {value:.2f}" for name, value in factors.items())
        + ".",
        "",
        "## On published figures",
        "Hwang et al. 2023 (Tutel), tables 2 and 7. Six constants from the first rows; see `docs/howto/plan.md`.",
        "",
        *lines(*compare()),
        "",
        "## Swin V2-G",
        "GiB of one rank in bfloat16, 192 px, 8 images a rank, plain and with each way of needing less. Planned for",
        "A100s of 80 GB; never measured.",
        "",
        *giant(),
    ]
    target.write_text("\n".join(text) + "\n", encoding="utf-8")


WAYS = {
    "data parallel": {},
    "ZeRO-1": {"parallel.zero": "true"},
    "ZeRO-1, recomputed": {"parallel.zero": "true", "model.grad_checkpointing": "true"},
    "ZeRO-1, recomputed, attention in turns": {
        "parallel.zero": "true",
        "model.grad_checkpointing": "true",
        "model.attention_chunks": "[8,8,1,1]",
    },
    "FSDP, recomputed": {"parallel.shard_dense": "true", "model.grad_checkpointing": "true"},
}


def giant(images: int = 8) -> Iterator[str]:
    """Memory of Swin V2-G on 1 to 64 GPUs, by tactics; too large ones in brackets."""
    hardware = replace(load_hardware("a100"), fused_attention=False)
    sizes = (1, 2, 4, 8, 16, 32, 64)
    yield "| | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in sizes) + " |"
    yield "|---|" + "---:|" * len(sizes)
    for name, keys in WAYS.items():
        words = [f"{key}={value}" for key, value in keys.items()]
        preset = ("model.preset=swin_v2_g_192_w12", "train.precision=bf16", "train.accumulation=1")
        run = load(RunConfig, ROOT / "configs/train/swin_v2_l_192_w12_22k.yaml", (*preset, *words))
        cells = []
        for n in sizes:
            found = predict(at_batch(run, n, images), Scene(hardware, n))
            size = f"{found.memory.total / 2**30:.1f}"
            cells.append(size if found.fits else f"({size})")
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page", "published", "giant"))
    parser.add_argument("--out", type=Path, default=Path("runs/plan"))
    parser.add_argument("--page", type=Path)
    parser.add_argument("--quick", action="store_true")
    words = parser.parse_args()
    if words.what == "run":
        measure(words.out.resolve(), words.quick)
    elif words.what == "page":
        page(words.out, words.page or Path(f"docs/results/{datetime.now(UTC):%Y-%m-%d}-plan.md"))
    else:
        sys.stdout.write("\n".join(lines(*compare()) if words.what == "published" else giant()) + "\n")


if __name__ == "__main__":
    main()
