"""The study of `docs/results/*-capacity.md`: Swin-MoE's capacity table, the tuner, and capacity that follows the load.

    python docs/results/capacity.py run --out runs/capacity --seeds 0 1     # each seed on a core of its own; resumable
    python docs/results/capacity.py page --out runs/capacity --page docs/results/DATE-capacity.md

Some ten minutes on two idle CPU cores for two seeds. `--quick` does everything with a few images and steps: a check
that takes two minutes and says nothing about accuracy. The page is written from records and JSON files alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from swinmoe.config.io import merge
from swinmoe.records import read_records
from swinmoe.report import estimate
from swinmoe.report.theme import LIGHT, new_figure, styled, to_png

STEPS = 200
MODEL: dict[str, Any] = {
    "style": "swin_moe",
    "img_size": 28,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 32,
    "depths": [3],
    "num_heads": [2],
    "window_size": 7,
    "drop_path_rate": 0.0,
    "moe_blocks": [[0, 1, 2]],
    "moe": {"num_experts": 8, "router": {"noise": 1.0}, "losses": {"gshard": 0.01}},
}
RUN: dict[str, Any] = {
    "model": MODEL,
    "data": {"name": "fashion_mnist", "image_size": 28, "augment": {"horizontal_flip": 0.5}},
    "optim": {"base_lr": 3.0e-3},
    "schedule": {"warmup_steps": 30, "min_lr": 3.0e-5},
    "train": {"epochs": None, "steps": STEPS, "batch_size": 128, "eval_every_epochs": None},
    "checkpoint": {"every_epochs": 0, "every_steps": 100, "keep_last": 1},
    "log": {"every_steps": 10, "peak_flops": 1.0e11},
}
TRAINED = ((1, 1.0), (2, 1.0), (2, 0.625))
"""(k, capacity factor in training), as in the table."""
AT = ("1.25", "1.0", "0.625", "0.5", "0.25", "dropless")
"""Capacity factors at evaluation; the table has the first four."""
EVALUATED = 4000
"""Test images of the table."""
POLICIES: dict[str, dict[str, Any]] = {
    "fixed 1.0": {"kind": "fixed", "factor": 1.0},
    "fixed 1.25": {"kind": "fixed", "factor": 1.25},
    "dropless": {"kind": "dropless"},
    "adaptive, 1 %": {"kind": "adaptive", "factor": 1.25, "adapt": {"max_drop": 0.01}},
}
ASKED = {"drops": ("--max-drop", "0.01"), "accuracy": ("--within", "0.5")}
QUICK = ("train.steps=4", "schedule.warmup_steps=1", "data.limit=200", "train.batch_size=20")


@dataclass(frozen=True)
class Work:
    """One command, and the file by which it is known to be done."""

    argv: tuple[str, ...]
    done: Path
    may_fail: bool = False
    """The tuner's exit status 1 is a finding."""

    @property
    def finished(self) -> bool:
        if not self.done.is_file():
            return False
        if self.argv[0] in ("train", "compare"):
            finals = sum(line["kind"] == "final" for line in read_records(self.done))
            return finals == (len(POLICIES) if self.argv[0] == "compare" else 1)
        return True


def named(top_k: int, factor: float, priority: bool) -> str:
    """A run's folder."""
    return f"k{top_k}_f{factor:g}_{'priority' if priority else 'order'}"


def configs(folder: Path) -> tuple[Path, Path]:
    """The run and the comparison that everything starts from, as files."""
    folder.mkdir(parents=True, exist_ok=True)
    single, many = folder / "run.yaml", folder / "policies.yaml"
    single.write_text(yaml.safe_dump(RUN, sort_keys=False))
    # The padded layout, where slots cost time whether they are filled or not.
    over = {"model": {"moe": {"router": {"batch_prioritized": True}, "dispatcher": "padded"}}}
    base = merge(RUN, over)
    arms = {plain(name): {"model": {"moe": {"capacity": {"train": policy}}}} for name, policy in POLICIES.items()}
    many.write_text(yaml.safe_dump({"match": "steps", "base": base, "arms": arms}, sort_keys=False))
    return single, many


def works(folder: Path, seed: int, quick: bool) -> Iterator[Work]:
    """Everything of one seed, in order."""
    single, many = configs(folder)
    home = folder / f"seed-{seed}"
    every = (f"output_dir={home}", "resume=auto")
    few = QUICK if quick else ()
    words = ("train", str(single), *every, *few, f"seed={seed}")
    yield Work((*words, "name=dense", "model.moe=null"), _records(home, "dense"))
    for top_k, factor in TRAINED:
        for priority in (True, False):
            name = named(top_k, factor, priority)
            own = (
                f"model.moe.top_k={top_k}",
                f"model.moe.router.normalize_gates={str(top_k > 1).lower()}",
                f"model.moe.router.batch_prioritized={str(priority).lower()}",
                f"model.moe.capacity.train={{kind: fixed, factor: {factor}}}",
            )
            yield Work((*words, f"name={name}", *own), _records(home, name))
            out = home / f"{name}_at"
            limit = ("data.limit=200",) if quick else (f"data.limit={EVALUATED}",)
            swept = ("evaluate", str(home / name), "--capacity", ",".join(AT), "--out", str(out), *limit)
            yield Work(swept, out / "evaluation.json")
    few_base = tuple(f"base.{word}" for word in few)
    yield Work(
        ("compare", str(many), *every, *few_base, f"seeds=[{seed}]", "name=policies"), _records(home, "policies")
    )
    model = home / named(1, 1.0, True)
    for name, asked in ASKED.items():
        out = home / f"tune_{name}"
        size = (
            ("--images", "160", "--rounds", "2", "train.eval_batch_size=40")
            if quick
            else ("--images", "1024", "--rounds", "9")
        )
        yield Work(("tune", "capacity", str(model), *asked, *size, "--out", str(out)), out / "tune.png", may_fail=True)


def _records(home: Path, name: str) -> Path:
    return home / name / "records.jsonl"


def plain(name: str) -> str:
    """An arm's name."""
    return name.replace(",", "").replace(" %", "").replace(" ", "_")


def run(folder: Path, seeds: Sequence[int], quick: bool) -> None:
    """Do what is not done yet; a seed's work in order, seeds side by side, one thread each."""
    console = Console(stderr=True, highlight=False)
    configs(folder)

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
            if done.returncode and not (work.may_fail and done.returncode == 1 and work.finished):
                raise RuntimeError(f"seed {seed}: {' '.join(work.argv)}\n{done.stderr}")

    with ThreadPoolExecutor(len(seeds)) as pool:
        list(pool.map(one, seeds))


# ---------------------------------------------------------------------------------------------------------- the page


def swept(folder: Path, top_k: int, factor: float, priority: bool) -> list[dict[str, dict[str, float]]]:
    """Of each seed: capacity factor at evaluation -> what came of it."""
    paths = sorted(folder.glob(f"seed-*/{named(top_k, factor, priority)}_at/evaluation.json"))
    return [{str(p["factor"]): p for p in json.loads(path.read_text())["capacity"]} for path in paths]


def cell(values: Sequence[float], digits: int = 1, scale: float = 100) -> str:
    """`83.1 ± 0.4` over seeds, in percent unless scaled otherwise."""
    found = estimate(values)
    if found is None:
        return "–"
    half = "" if found.half_width is None else f" ± {scale * found.half_width:.{digits}f}"
    return f"{scale * found.mean:.{digits}f}{half}"


def lines_of(folder: Path, name: str, kind: str) -> list[list[Mapping[str, Any]]]:
    """Of each seed, the records of a kind."""
    return [
        [line for line in read_records(path) if line["kind"] == kind]
        for path in sorted(folder.glob(f"seed-*/{name}/records.jsonl"))
    ]


def page(folder: Path, target: Path) -> None:
    """Write the page and its pictures from what `run` left."""
    homes = sorted(folder.glob("seed-*"))
    begun = lines_of(folder, "dense", "run")[0][0]
    environment, train = begun["environment"], begun["config"]["train"]
    pictures = target.parent / "capacity"
    pictures.mkdir(parents=True, exist_ok=True)
    (pictures / "table.png").write_bytes(_curves(folder))
    (pictures / "followed.png").write_bytes(_followed(folder))
    (pictures / "tune.png").write_bytes((homes[0] / "tune_drops" / "tune.png").read_bytes())
    dense = [lines[-1]["accuracy"] for lines in lines_of(folder, "dense", "final")]
    out = [
        "# Capacity: Swin-MoE's table, the tuner, and a factor that follows the load",
        f"{datetime.now(UTC):%Y-%m-%d}, commit {str(environment['git_commit'])[:7]}, seeds: {len(homes)}, one CPU core "
        "each.",
        "",
        "```sh",
        f"python docs/results/capacity.py run --out runs/capacity --seeds {' '.join(h.name[5:] for h in homes)}",
        f"python docs/results/capacity.py page --out runs/capacity --page {target.as_posix()}",
        "```",
        "",
        f"Three blocks of width {MODEL['embed_dim']} on Fashion-MNIST, 8 experts in each, gate noise 1;",
        f"{train['steps']} steps of {train['batch_size']} images, capacity fixed, as Swin-MoE has it. Accuracy in",
        f"percent, mean over seeds ± half of the 95 % t interval. Dense, on all test images: {cell(dense)}.",
        "",
        "## Accuracy over capacity in training and in evaluation",
        "The shape of table 12 of the Tutel paper (Hwang et al. 2023), with batch-prioritised routing (BPR) in",
        f"training and evaluation, and with neither; the first {EVALUATED} test images.",
        "",
        "| k | train-f | infer-f | BPR | in order | dropped, BPR | in order |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for top_k, factor in TRAINED:
        both = [swept(folder, top_k, factor, priority) for priority in (True, False)]
        for at in AT:
            key = at if at == "dropless" else str(float(at))
            accuracy = [cell([seed[key]["accuracy"] for seed in seeds]) for seeds in both]
            drops = [cell([seed[key]["drop_fraction"] for seed in seeds]) for seeds in both]
            out.append(f"| {top_k} | {factor:g} | {at} | {' | '.join(accuracy)} | {' | '.join(drops)} |")
    out += ["", f"![accuracy over the factor]({pictures.name}/table.png)", "", "## What the tuner recommends"]
    out += ["For the model of k = 1, train-f 1.0, BPR; chosen on half of the images, checked on the others.", ""]
    out += ["| seed | asked | mode | factors by layer | dropped | accuracy | dropless | ms | dropless | kept? |"]
    out += ["|---:|---|---|---|---:|---:|---:|---:|---:|---|"]
    for home in homes:
        for name in ASKED:
            for line in read_records(home / f"tune_{name}" / "records.jsonl"):
                if line["kind"] == "recommendation":
                    out.append(f"| {home.name[5:]} | {_recommended(line)} |")
    out += ["", f"![curves of the first seed]({pictures.name}/tune.png)", "", "## A factor that follows the load"]
    out += [
        "Four arms in lockstep on the same batches, k = 1, BPR, the padded layout, evaluation dropless on all test",
        "images. Time is that of all steps, over that of fixed 1.25.",
        "",
        "| capacity in training | accuracy | time | dropped | worst batch of the log |",
        "|---|---:|---:|---:|---:|",
    ]
    reference = _seconds(folder, plain("fixed 1.25"))
    for name in POLICIES:
        arm = plain(name)
        finals = [[r for r in seed if r["arm"] == arm] for seed in lines_of(folder, "policies", "final")]
        accuracy = cell([seed[-1]["accuracy"] for seed in finals])
        time = cell([own / base for own, base in zip(_seconds(folder, arm), reference, strict=True)], 2, 1)
        mean, worst = _drops(folder, arm)
        out.append(f"| {name} | {accuracy} | {time} | {cell(mean, 2)} | {cell(worst, 2)} |")
    out += [
        "",
        f"![factor and need over steps]({pictures.name}/followed.png)",
        "",
        "## What it does not show",
        "- Few seeds of a model of some hundred thousand parameters, trained for a minute: small differences",
        "  are within the intervals, and nothing here is about other sizes.",
        "- All experts are on one process: what capacity saves in an exchange between ranks is not in these times.",
        "- Drops of the log are means over ten steps and a layer; the promise of the adaptive policy, which is per",
        "  batch and layer, is held by the tests.",
    ]
    target.write_text("\n".join(out) + "\n", encoding="utf-8")


def _recommended(line: Mapping[str, Any]) -> str:
    factors = ", ".join("dropless" if f is None else f"{f:g}" for f in line["factors"].values())
    checked, dropless, ms = line["checked"], line["dropless"], line["ms"]
    cells = [
        line["asked"],
        {"train": "training", "eval": "evaluation"}[line["mode"]],
        factors,
        f"{100 * checked['drop_fraction']:.2f} %",
        f"{100 * checked['accuracy']:.2f}",
        f"{100 * dropless['accuracy']:.2f}",
        f"{ms['recommended']['median']:.1f}",
        f"{ms['dropless']['median']:.1f}",
        "no" if line["failures"] else "yes",
    ]
    return " | ".join(cells)


def _seconds(folder: Path, arm: str) -> list[float]:
    return [[r for r in seed if r["arm"] == arm][-1]["seconds"] for seed in lines_of(folder, "policies", "step")]


def _drops(folder: Path, arm: str) -> tuple[list[float], list[float]]:
    """Of each seed: share of all choices dropped, and the largest of a layer in a log line."""
    mean, worst = [], []
    for seed in lines_of(folder, "policies", "step"):
        layers = [layer for line in seed if line["arm"] == arm for layer in line["routing"].values()]
        routed = sum(sum(layer["routed"]) for layer in layers)
        mean.append(1 - sum(sum(layer["kept"]) for layer in layers) / routed)
        worst.append(max(layer["drop_fraction"] for layer in layers))
    return mean, worst


def _curves(folder: Path) -> bytes:
    with styled(LIGHT):
        figure = new_figure(9.6, 3.4)
        for axes, (top_k, factor) in zip(figure.subplots(1, len(TRAINED), sharey=True), TRAINED, strict=True):
            for index, priority in enumerate((True, False)):
                seeds = swept(folder, top_k, factor, priority)
                numbers = sorted(float(at) for at in AT if at != "dropless")
                means = [100 * sum(seed[str(n)]["accuracy"] for seed in seeds) / len(seeds) for n in numbers]
                label = "BPR" if priority else "in order"
                axes.plot(numbers, means, "o-", color=LIGHT.arm(index), markersize=4, label=label)
            axes.set(xlabel="factor in evaluation")
            axes.set_title(f"k {top_k}, train-f {factor:g}")
        figure.axes[0].set_ylabel("test accuracy, %")
        figure.axes[0].legend(frameon=False)
        return to_png(figure)


def _followed(folder: Path) -> bytes:
    arm = plain("adaptive, 1 %")
    steps = [line for line in lines_of(folder, "policies", "step")[0] if line["arm"] == arm]
    layers = list(steps[0]["routing"])
    with styled(LIGHT):
        figure = new_figure(9.6, 3.0)
        for axes, layer in zip(figure.subplots(1, len(layers), sharey=True), layers, strict=True):
            x = [line["step"] for line in steps]
            needs = [line["routing"][layer]["capacity_need"] for line in steps]
            factors = [line["routing"][layer]["capacity_factor"] for line in steps]
            axes.plot(x, needs, "o", color=LIGHT.arm(1), markersize=3, label="largest need of 10 steps")
            axes.step(x, factors, where="post", color=LIGHT.arm(0), label="factor that stands")
            axes.set(xlabel="step")
            axes.set_title(layer)
        figure.axes[0].set_ylabel("capacity factor")
        figure.axes[0].legend(frameon=False)
        return to_png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--out", type=Path, default=Path("runs/capacity"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--page", type=Path)
    parser.add_argument("--quick", action="store_true")
    words = parser.parse_args()
    if words.what == "run":
        run(words.out, words.seeds, words.quick)
    else:
        page(words.out, words.page or Path(f"docs/results/{datetime.now(UTC):%Y-%m-%d}-capacity.md"))


if __name__ == "__main__":
    main()
