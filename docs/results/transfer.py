"""The study of `docs/results/*-transfer.md`: dense and sparse twins, pre-trained, fine-tuned, probed and upcycled.

    python docs/results/transfer.py run --out runs/transfer --seeds 0 1     # each seed on a core of its own; resumable
    python docs/results/transfer.py page --out runs/transfer --page docs/results/DATE-transfer.md

Some 40 minutes on two idle CPU cores for two seeds. `--quick` does everything with a few images and steps: a check that
takes three minutes and says nothing about accuracy. The page is written from records and JSON files alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from swinmoe.config import RunConfig
from swinmoe.config.io import load, read_yaml
from swinmoe.models.counts import count
from swinmoe.records import read_records
from swinmoe.report import estimate
from swinmoe.report.theme import LIGHT, new_figure, styled, to_png

ROOT = Path(__file__).parents[2]
PRETRAIN = ROOT / "configs" / "pretrain"
FINETUNE = ROOT / "configs" / "finetune"
DENSE = ("model.moe=null", "model.moe_blocks=[]")
TWINS = ("dense", "sparse")
POLICIES = {"dense": ("none", "backbone"), "sparse": ("none", "router", "experts", "moe", "backbone")}
GOALS = {"digits": "fashion_mnist", "fashion_mnist": "digits"}
"""Fine-tuned on -> pre-trained on."""
SHOTS = (1, 5, 10)
CAPACITIES = "0.25,0.5,0.75,1,1.25,2,dropless"
QUICK = (
    *("train.steps=2", "schedule.warmup_steps=1", "data.limit=200", "log.peak_flops=1e11", "train.batch_size=20"),
    "checkpoint.asynchronous=false",
)
UPCYCLED = {
    "dense, trained on": (*DENSE, "finetune.upcycle=null"),
    "upcycled, copies": ("finetune.upcycle.drop=0", "finetune.upcycle.noise=0", "finetune.upcycle.shuffle=false"),
    "upcycled, half drawn anew": (),
}
SCRATCH = "sparse from scratch"


@dataclass(frozen=True)
class Work:
    """One command, and the file by which it is known to be done."""

    argv: tuple[str, ...]
    done: Path

    @property
    def finished(self) -> bool:
        if self.done.suffix != ".jsonl":
            return self.done.is_file()
        return self.done.is_file() and any(line["kind"] == "final" for line in read_records(self.done))


def works(folder: Path, seed: int, quick: bool) -> Iterator[Work]:
    """Everything of one seed, in order."""
    home = folder / f"seed-{seed}"
    every = (f"seed={seed}", f"output_dir={home}", "resume=auto", *(QUICK if quick else ()))

    def trained(command: str, config: Path, name: str, *words: str) -> Work:
        return Work((command, str(config), *every, f"name={name}", *words), home / name / "records.jsonl")

    for goal in GOALS:
        for twin in TWINS:
            dense = DENSE if twin == "dense" else ()
            yield trained("train", PRETRAIN / f"{goal}.yaml", f"pre_{goal}_{twin}", *dense)
    for goal, origin in GOALS.items():
        tune = read_yaml(FINETUNE / f"{goal}.yaml")
        same = [
            f"data.limit={tune['data'].get('limit', 'null')}",
            f"train.epochs={tune['train']['epochs']}",
            f"train.batch_size={tune['train']['batch_size']}",
            f"schedule.warmup_steps={tune['schedule']['warmup_steps']}",
        ]
        for twin in TWINS:
            dense = DENSE if twin == "dense" else ()
            scratch = [*same, *(QUICK if quick else ()), *dense]
            yield trained("train", PRETRAIN / f"{goal}.yaml", f"scratch_{goal}_{twin}", *scratch)
            source = ("--from", str(home / f"pre_{origin}_{twin}"))
            for policy in POLICIES[twin]:
                words = (*source, f"finetune.freeze={policy}", *(dense or ("model.moe.experts.dropout=0",)))
                yield trained("finetune", FINETUNE / f"{goal}.yaml", f"tune_{goal}_{twin}_{policy}", *words)
    steps = {twin: steps_of_one_dense_epoch(twin) for twin in TWINS}
    source = ("--from", str(home / "pre_fashion_mnist_dense"))
    for name, words in UPCYCLED.items():
        length = () if quick else (f"train.steps={steps['dense' if words[:1] == DENSE[:1] else 'sparse']}",)
        config = FINETUNE / "fashion_mnist_upcycled.yaml"
        yield trained("finetune", config, plain(name), *source, *words, *length)
    more = read_yaml(FINETUNE / "fashion_mnist_upcycled.yaml")
    length = (
        () if quick else (f"train.steps={steps['sparse']}", f"schedule.warmup_steps={more['schedule']['warmup_steps']}")
    )
    yield trained("train", PRETRAIN / "fashion_mnist.yaml", plain(SCRATCH), *length)
    for origin in GOALS:
        for twin in TWINS:
            model = home / f"pre_{origin}_{twin}"
            for goal in GOALS:
                data = (f"data.name={goal}", f"data.limit={200 if quick else 'null'}")
                for shots in (1,) if quick else SHOTS:
                    out = home / f"few_{origin}_{twin}_{goal}_{shots}.json"
                    options = ("--shots", str(shots), "--draws", "10", "--out", str(out))
                    yield Work(("fewshot", str(model), *data, *options), out)
    model, out = home / "pre_fashion_mnist_sparse", home / "capacity"
    yield Work(("evaluate", str(model), "--capacity", CAPACITIES, "--out", str(out)), out / "evaluation.json")


def steps_of_one_dense_epoch(twin: str) -> int:
    """Optimiser steps of a twin that cost the training FLOPs of one epoch of the dense one."""
    runs = {"dense": load(RunConfig, PRETRAIN / "fashion_mnist.yaml", DENSE)}
    runs["sparse"] = load(RunConfig, PRETRAIN / "fashion_mnist.yaml")
    size = runs["dense"].train.batch_size
    cost = {name: count(run.model).step_flops(size) for name, run in runs.items()}
    return int(60_000 // size * cost["dense"] // cost[twin])


def plain(name: str) -> str:
    """A folder's name."""
    return name.replace(",", "").replace(" ", "_")


def run(folder: Path, seeds: Sequence[int], quick: bool) -> None:
    """Do what is not done yet; a seed's work in order, seeds side by side, one thread each."""
    console = Console(stderr=True, highlight=False)

    def one(seed: int) -> None:
        todo = list(works(folder, seed, quick))
        for number, work in enumerate(todo, start=1):
            if work.finished:
                continue
            console.print(f"seed {seed}, {number} of {len(todo)}: {' '.join(work.argv)}", markup=False, soft_wrap=True)
            done = subprocess.run(
                [sys.executable, "-m", "swinmoe.cli", *work.argv],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"seed {seed}: {' '.join(work.argv)}\n{done.stderr}")

    with ThreadPoolExecutor(len(seeds)) as pool:
        list(pool.map(one, seeds))


# ---------------------------------------------------------------------------------------------------------- the page


def last_accuracy(folder: Path, name: str) -> list[float]:
    """Accuracy at the end, one of each seed that has one."""
    found = []
    for home in sorted(folder.glob("seed-*")):
        path = home / name / "records.jsonl"
        if path.is_file():
            found += [float(line["accuracy"]) for line in read_records(path) if line["kind"] == "final"][-1:]
    return found


def few_accuracy(folder: Path, origin: str, twin: str, goal: str, shots: int) -> list[float]:
    paths = sorted(folder.glob(f"seed-*/few_{origin}_{twin}_{goal}_{shots}.json"))
    return [float(json.loads(path.read_text())["accuracy"]) for path in paths]


def cell(values: Sequence[float]) -> str:
    """`83.1 ± 0.4`, in percent, over seeds; fewer than three of them are listed."""
    if 0 < len(values) < 3:
        return ", ".join(f"{100 * value:.1f}" for value in values)
    found = estimate(values)
    if found is None:
        return "–"
    half = "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"
    return f"{100 * found.mean:.1f}{half}"


def differences(folder: Path) -> Iterator[str]:
    """Rows of a table: what is compared, and the points between, seed by seed."""

    def row(what: str, these: Sequence[float], those: Sequence[float]) -> str:
        points = [100 * (a - b) for a, b in zip(these, those, strict=True)]
        agree = len({(point > 0) - (point < 0) for point in points}) == 1
        return f"| {what} | {', '.join(f'{point:+.1f}' for point in points)} | {'yes' if agree else 'no'} |"

    def last(name: str) -> list[float]:
        return last_accuracy(folder, name)

    for goal in GOALS:
        yield row(f"pre-training on {goal}: sparse over dense", last(f"pre_{goal}_sparse"), last(f"pre_{goal}_dense"))
    for goal, origin in GOALS.items():
        free = {twin: last(f"tune_{goal}_{twin}_none") for twin in TWINS}
        for twin in TWINS:
            yield row(f"{origin} → {goal}, {twin}: over from scratch", free[twin], last(f"scratch_{goal}_{twin}"))
        yield row(f"{origin} → {goal}: sparse over dense", free["sparse"], free["dense"])
        for policy in ("router", "experts", "moe"):
            frozen = last(f"tune_{goal}_sparse_{policy}")
            yield row(f"{origin} → {goal}, sparse: frozen {policy} over none", frozen, free["sparse"])
    for origin in GOALS:
        few = {twin: few_accuracy(folder, origin, twin, origin, 5) for twin in TWINS}
        yield row(f"5 shots on {origin}, pre-trained on it: sparse over dense", few["sparse"], few["dense"])
    longer, *upcycled = (last(plain(name)) for name in UPCYCLED)
    for name, values in zip(list(UPCYCLED)[1:], upcycled, strict=True):
        yield row(f"{name} over dense, trained on", values, longer)


def losses(path: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_records(path) if line["kind"] == "step"]


def page(folder: Path, target: Path) -> None:
    """Write the page and its pictures from what `run` left."""
    homes = sorted(folder.glob("seed-*"))
    commit = _commit(homes[0] / "pre_digits_dense" / "records.jsonl")
    pictures = target.parent / "transfer"
    pictures.mkdir(parents=True, exist_ok=True)
    link = pictures.name
    (pictures / "policies.png").write_bytes(_policies(folder))
    (pictures / "upcycling.png").write_bytes(_upcycling(homes[0]))
    lines = [
        "# Transfer: frozen experts, few shots, upcycling",
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit}, {len(homes)} seeds, one CPU core each.",
        "",
        "```sh",
        f"python docs/results/transfer.py run --out runs/transfer --seeds {' '.join(h.name[5:] for h in homes)}",
        f"python docs/results/transfer.py page --out runs/transfer --page {target.as_posix()}",
        "```",
        "",
        "Four blocks of width 48; the sparse twin sends every token to 2 of 8 experts of half width, so that an image",
        "costs both the same but for the router. Accuracies in percent on the data's own test images, of each seed, or",
        "of three and more the mean ± half of the 95 % t interval. Nothing was chosen by the test images: every run's",
        "last evaluation counts.",
        "",
        "## Differences, seed by seed",
        "A seed's twins share initial weights and batches. Percentage points of accuracy.",
        "",
        "| | points | same sign |",
        "|---|---:|---|",
        *differences(folder),
        "",
        "## Pre-training",
        "| data | dense | sparse |",
        "|---|---:|---:|",
        *(
            f"| {goal} | " + " | ".join(cell(last_accuracy(folder, f"pre_{goal}_{twin}")) for twin in TWINS) + " |"
            for goal in GOALS
        ),
        "",
        "## Fine-tuning, by what is frozen",
        "| | Fashion-MNIST → digits, dense | sparse | digits → Fashion-MNIST (6,000), dense | sparse |",
        "|---|---:|---:|---:|---:|",
    ]
    for policy in POLICIES["sparse"]:
        cells = [cell(last_accuracy(folder, f"tune_{goal}_{twin}_{policy}")) for goal in GOALS for twin in TWINS]
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    cells = [cell(last_accuracy(folder, f"scratch_{goal}_{twin}")) for goal in GOALS for twin in TWINS]
    lines.append(f"| from scratch, as long | {' | '.join(cells)} |")
    lines += ["", f"![accuracy by policy]({link}/policies.png)", "", "## Few shots on frozen features"]
    lines += ["Ridge regression, 10 draws of so many images a class.", ""]
    lines += ["| pre-trained on | probed on | shots | dense | sparse |", "|---|---|---:|---:|---:|"]
    for origin in GOALS:
        for goal in GOALS:
            for shots in SHOTS:
                cells = [cell(few_accuracy(folder, origin, twin, goal, shots)) for twin in TWINS]
                lines.append(f"| {origin} | {goal} | {shots} | {' | '.join(cells)} |")
    start = cell(last_accuracy(folder, "pre_fashion_mnist_dense"))
    lines += [
        "",
        "## Upcycling at equal extra compute",
        f"All but the last begin with the dense model ({start}); all get the training FLOPs of one more dense epoch,",
        f"router counted: {steps_of_one_dense_epoch('dense')} steps dense, {steps_of_one_dense_epoch('sparse')} sparse",
        "",
        "| | accuracy |",
        "|---|---:|",
        *(f"| {name} | {cell(last_accuracy(folder, plain(name)))} |" for name in (*UPCYCLED, SCRATCH)),
        "",
        f"![training loss]({link}/upcycling.png)",
        "",
        "## Capacity at evaluation",
        "The sparse model of Fashion-MNIST, trained dropless; the first seed.",
        "",
        "| factor | accuracy | choices dropped |",
        "|---|---:|---:|",
    ]
    sweep = json.loads((homes[0] / "capacity" / "evaluation.json").read_text())["capacity"]
    lines += [f"| {p['factor']} | {100 * p['accuracy']:.2f} | {100 * p['drop_fraction']:.2f} % |" for p in sweep]
    lines += [
        "",
        "## What it does not show",
        f"- {len(homes)} seeds, small images, models of 0.1 and 0.4 M parameters, minutes of training: seeds differ by",
        "  points, two of the same sign are no proof, and nothing here says how policies compare at scale.",
        "- Policies share one learning rate and length, those of the config; none was tuned for any of them.",
        "- Digits' test set has 360 images: 0.3 points are one image.",
    ]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _commit(path: Path) -> str:
    """Of the code that ran."""
    first = next(line for line in read_records(path) if line["kind"] == "run")
    return str(first["environment"]["git_commit"])[:7]


def _policies(folder: Path) -> bytes:
    with styled(LIGHT):
        figure = new_figure(9, 3.4)
        for axes, goal in zip(figure.subplots(1, 2), GOALS, strict=True):
            labels = [*POLICIES["sparse"], "scratch"]
            for index, twin in enumerate(TWINS):
                for place, label in enumerate(labels):
                    name = f"scratch_{goal}_{twin}" if label == "scratch" else f"tune_{goal}_{twin}_{label}"
                    values = [100 * value for value in last_accuracy(folder, name)]
                    shift = place + (index - 0.5) * 0.2
                    named = twin if place == 0 else None
                    axes.plot([shift] * len(values), values, "o", color=LIGHT.arm(index), markersize=5, label=named)
            axes.set_xticks(range(len(labels)), labels)
            axes.set_ylabel("test accuracy, %")
            axes.set_title(f"{GOALS[goal]} → {goal}, by what is frozen")
            axes.legend(frameon=False)
        return to_png(figure)


def _upcycling(home: Path) -> bytes:
    with styled(LIGHT):
        figure = new_figure(6.4, 3.6)
        axes = figure.subplots()
        for index, name in enumerate((*UPCYCLED, SCRATCH)):
            points = losses(home / plain(name) / "records.jsonl")
            axes.plot([p[0] for p in points], [p[1] for p in points], color=LIGHT.arm(index), label=name)
        axes.set(xlabel="step", ylabel="training loss")
        axes.set_title("Fashion-MNIST, the extra epoch")
        axes.legend(frameon=False)
        return to_png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--page", type=Path)
    parser.add_argument("--quick", action="store_true")
    words = parser.parse_args()
    if words.what == "run":
        run(words.out, words.seeds, words.quick)
    else:
        page(words.out, words.page or Path(f"docs/results/{datetime.now(UTC):%Y-%m-%d}-transfer.md"))


if __name__ == "__main__":
    main()
