"""The command line: argv -> (command, typed config) -> run.

Exit status: 0 done; 2 what the user can mend, in one message (a config, a file, a full disk); 1 anything else that went
wrong, another rank's end too; 75 stopped by SIGTERM or SIGUSR1, and saved: start it again; 130 interrupted. Of several
processes, one prints what they all have to say. Tracebacks are shown with `--debug` only.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal, Never

import typer
from typer.core import TyperGroup

from swinmoe.errors import CollectiveError, Preempted, SwinMoEError
from swinmoe.version import __version__


class _Stopped(Exception):
    """Carries its cause past typer, which has a word and a status of its own for these two."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, EOFError) as error:
            raise _Stopped from error


app = typer.Typer(
    name="swinmoe",
    cls=_Commands,
    help="Mixture-of-Experts scaling for vision: train Swin-MoE beside its dense twin.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path, typer.Argument(help="A YAML file; see configs/.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, e.g. optim.base_lr=1e-3 model.moe=null", show_default=False)
]
Shrink = Annotated[
    bool, typer.Option("--shrink", help="Two steps of a much smaller model on synthetic images: a check.")
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"swinmoe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """`--debug` is taken out by `main` and stands here for `--help`."""


# Commands import their work when called, so that `swinmoe --help` and bad arguments answer at once.


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    shrink: Shrink = False,
    trace: Annotated[
        str | None, typer.Option("--trace", help="Steps to trace for Perfetto, e.g. 10:13.", show_default=False)
    ] = None,
) -> None:
    """Train one model from a config."""
    from swinmoe.commands import train as command

    command.run(config, overrides or [], shrunk=shrink, trace=trace)


@app.command()
def finetune(
    config: Config,
    overrides: Overrides = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="A run, checkpoint, saved model or another project's weights.", show_default=False),
    ] = None,
) -> None:
    """Train on from somebody's weights: other classes, images, windows; with parts of the model frozen."""
    from swinmoe.commands import finetune as command

    command.run(config, source, overrides or [])


Trained = Annotated[Path, typer.Argument(help="A run, checkpoint, saved model or weights.", show_default=False)]
Rest = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="CONFIG may be left out if CKPT says its own."),
]
Weights = Annotated[
    Literal["auto", "model", "average"],
    typer.Option("--weights", help="The weights or their moving average; auto: the average if there is one."),
]
Average = Annotated[bool, typer.Option("--average", help="The same as --weights average.", hidden=True)]
Images = Annotated[
    list[str], typer.Argument(help="Pictures, folders of pictures, and key=value overrides.", show_default=False)
]


@app.command()
def evaluate(
    ckpt: Trained,
    rest: Rest = None,
    capacity: Annotated[
        str | None, typer.Option("--capacity", help="Also at these capacity factors, e.g. 0.5,1,1.25,dropless.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for JSON, Markdown and pictures.")] = None,
    weights: Weights = "auto",
) -> None:
    """Accuracy, by class, calibration, speed; with experts, what other capacities would give."""
    from swinmoe.commands import evaluate as command

    command.run(ckpt, rest or [], which=weights, capacity=capacity, out=out)


@app.command()
def fewshot(
    ckpt: Trained,
    rest: Rest = None,
    shots: Annotated[int, typer.Option("--shots", help="Training images of each class.")] = 5,
    draws: Annotated[int, typer.Option("--draws", help="Times to draw them anew.")] = 5,
    l2: Annotated[float | None, typer.Option("--l2", help="The penalty; default: by leaving one out.")] = None,
    knn: Annotated[int | None, typer.Option("--knn", help="Instead: so many nearest of all training images.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="A JSON file to write.")] = None,
    weights: Weights = "auto",
) -> None:
    """Accuracy of a linear probe on frozen features from a few images a class, or of nearest neighbours."""
    from swinmoe.commands import fewshot as command

    command.run(ckpt, rest or [], which=weights, shots=shots, draws=draws, strength=l2, neighbours=knn, out=out)


@app.command()
def predict(
    ckpt: Trained,
    images: Images,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    weights: Weights = "auto",
) -> None:
    """The most likely classes of pictures."""
    from swinmoe.commands import predict as command

    paths, overrides = _paths(images)
    command.run(ckpt, paths, overrides, which=weights, as_json=as_json)


@app.command()
def look(
    ckpt: Trained,
    images: Images,
    out: Annotated[Path, typer.Option("--out", help="The PNG to write.")] = Path("experts.png"),
    dark: Annotated[bool, typer.Option("--dark", help="For dark pages.")] = False,
    weights: Weights = "auto",
) -> None:
    """Which expert takes which patch of pictures, layer by layer, as one image."""
    from swinmoe.commands import look as command

    paths, overrides = _paths(images)
    command.run(ckpt, paths, overrides, which=weights, out=out, dark=dark)


def _paths(words: list[str]) -> tuple[list[Path], list[str]]:
    """Paths, and overrides: words with an equals sign that name no file."""
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    return [Path(word) for word in words if word not in overrides], overrides


@app.command()
def compare(config: Config, overrides: Overrides = None, shrink: Shrink = False) -> None:
    """Train dense and sparse twins side by side and write a report."""
    from swinmoe.commands import compare as command

    command.run(config, overrides or [], shrunk=shrink)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="A run's folder; of profiles several.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to; default: the first folder.", show_default=False)
    ] = None,
) -> None:
    """Write a run's report again from its records, or one page of several profiles."""
    from swinmoe.commands import report as command

    command.run(folders, out)


Checkpoint = Annotated[
    Path,
    typer.Argument(help="A checkpoint, a saved model, a run's folder or a .safetensors file.", show_default=False),
]


@app.command()
def inspect(
    checkpoint: Checkpoint,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and hold it against its hash.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="Every expert's tensors in lines of their own.")] = False,
) -> None:
    """Show what a checkpoint holds, or all checkpoints of a run."""
    from swinmoe.commands import inspect as command

    command.run(checkpoint, verify=verify, tensors=tensors)


@app.command()
def diff(first: Checkpoint, second: Checkpoint) -> None:
    """Show in what two checkpoints differ. Exit status 1: they do."""
    from swinmoe.commands import diff as command

    raise typer.Exit(command.run(first, second))


@app.command()
def models(contains: Annotated[str, typer.Argument(help="Only names that contain this.")] = "") -> None:
    """List the named models with their parameters and FLOPs."""
    from swinmoe.commands import models as command

    command.run(contains)


@app.command()
def convert(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SRC... DST [KEY=VALUE]...",
            help="A file, all files of a job's ranks, or a folder; a new folder; settings of the model.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        str,
        typer.Option("--to", help="swinmoe, microsoft, timm, torchvision, huggingface, tutel or tutel-master."),
    ] = "swinmoe",
    preset: Annotated[str | None, typer.Option("--preset", help="The named model that the weights belong to.")] = None,
    allow: Annotated[list[str] | None, typer.Option("--allow", help="Pattern of names that need not fit.")] = None,
    class_map: Annotated[
        Path | None, typer.Option("--class-map", help="File of one old class index a line, for a new head.")
    ] = None,
    ranks: Annotated[int, typer.Option("--ranks", help="--to tutel: processes that will read the files.")] = 1,
    weights: Weights = "auto",
    listed: Annotated[bool, typer.Option("--list", help="List the published files (that contain SRC).")] = False,
) -> None:
    """Weights of Microsoft, timm, torchvision, Hugging Face, mmdet or Tutel into a model's folder, and back."""
    from swinmoe.commands import convert as command

    if listed:
        command.list_released(words[0] if words else "")
    else:
        command.run(
            words or [], to=to, preset=preset, allow=allow or [], class_map=class_map, ranks=ranks, which=weights
        )


@app.command()
def upcycle(
    dense: Annotated[Path, typer.Argument(help="Dense weights: ours, or any that can be loaded.", show_default=False)],
    config: Config,
    out: Annotated[Path, typer.Argument(help="A new folder for the sparse model.", show_default=False)],
    overrides: Overrides = None,
    noise: Annotated[float, typer.Option("--noise", help="On experts, over the deviation of their weights.")] = 0.0,
    drop: Annotated[float, typer.Option("--drop", help="Share of hidden units drawn anew in each expert.")] = 0.0,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Finer experts: cut in a random order.")] = False,
    any_function: Annotated[
        bool, typer.Option("--any-function", help="Also where outputs cannot stay what they were.")
    ] = False,
    moments: Annotated[str, typer.Option("--moments", help="Of the optimiser: reset or carry.")] = "reset",
    weights: Weights = "auto",
    average: Average = False,
    allow: Annotated[list[str] | None, typer.Option("--allow", help="Pattern of names that need not fit.")] = None,
) -> None:
    """Make a sparse model whose experts start as a dense model's MLPs, with the same outputs."""
    from swinmoe.checkpoint.upcycle import Upcycling
    from swinmoe.commands import upcycle as command
    from swinmoe.errors import ConfigError

    if moments not in ("reset", "carry"):
        raise ConfigError(f"--moments {moments}: use reset or carry")
    how = Upcycling(noise=noise, drop=drop, shuffle=shuffle, preserve=not any_function)
    which = "average" if average else weights
    command.run(
        dense, config, out, overrides or [], how, which=which, carry_moments=moments == "carry", allow=allow or []
    )


@app.command()
def experts(
    model: Annotated[Path, typer.Argument(help="A run, checkpoint or saved model.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="A new folder for the edited model.", show_default=False)],
    grow: Annotated[int | None, typer.Option("--grow", help="To so many experts, by copying.")] = None,
    keep: Annotated[str | None, typer.Option("--keep", help="These experts only, e.g. 0,3,5.")] = None,
    prune: Annotated[int | None, typer.Option("--prune", help="To the so many that data uses most.")] = None,
    merge: Annotated[str | None, typer.Option("--merge", help="To a dense model: average, or by usage.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="A config whose images to use; default the run's own.")
    ] = None,
    images: Annotated[int, typer.Option("--images", help="Training images to measure load on.")] = 2048,
    noise: Annotated[float, typer.Option("--noise", help="--grow: on the copies.")] = 0.0,
    any_function: Annotated[
        bool, typer.Option("--any-function", help="--grow: also where outputs cannot stay what they were.")
    ] = False,
    weights: Weights = "auto",
    average: Average = False,
) -> None:
    """Grow, keep, prune or merge a model's experts, with the accuracy before and after."""
    from swinmoe.commands import experts as command

    edit = command.Edit(
        grow=grow,
        keep=None if keep is None else command.parse_ids(keep),
        prune=prune,
        merge=merge,
        noise=noise,
        preserve=not any_function,
    )
    command.run(model, out, edit, data=data, images=images, which="average" if average else weights)


@app.command()
def plan(
    config: Annotated[Path | None, typer.Argument(help="A run's YAML file; see configs/.", show_default=False)] = None,
    overrides: Overrides = None,
    ranks: Annotated[str, typer.Option("--ranks", help="Numbers of ranks to plan for, e.g. 1,8,64,4096.")] = "1,8,64",
    hardware: Annotated[str, typer.Option("--hardware", help="h100, a100, cpu, or a YAML file of figures.")] = "h100",
    processes_per_node: Annotated[
        int | None, typer.Option("--processes-per-node", help="Ranks that share a machine; default the hardware's.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Images of each rank per step; default: the config's batch, shared.")
    ] = None,
    imbalance: Annotated[
        float | None, typer.Option("--imbalance", help="Busiest rank's rows over the mean; default: random choices'.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All ways tried, as JSON.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write the config with the best way laid on top.")] = None,
    dry_run: Annotated[
        int | None, typer.Option("--dry-run", help="Step the config as it is on so many ranks that are not there.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", help="Measure this machine instead, for --hardware FILE.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", help="--calibrate: so many on this machine's CPU; or a launcher.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="--calibrate: times that each piece of work is timed.")] = 9,
    refine: Annotated[
        list[Path] | None,
        typer.Option(
            "--refine", help="--calibrate: scale --hardware by records of profile model; may stand repeatedly."
        ),
    ] = None,
) -> None:
    """Predict step time and memory on machines that are not here, and the best way to spread a run over them."""
    from swinmoe.commands import plan as command
    from swinmoe.errors import ConfigError

    question = command.Question(command.parse_ranks(ranks), hardware, processes_per_node, batch, imbalance)
    if refine:
        if calibrate is None:
            raise ConfigError("--refine makes a new description of a machine; say where with --calibrate FILE")
        command.run_refinement(calibrate, refine, question)
        return
    if calibrate is not None:
        raise typer.Exit(command.run_calibration(calibrate, processes=processes, rounds=rounds))
    if config is None:
        raise ConfigError("swinmoe plan needs a config to plan for, or --calibrate FILE to measure this machine")
    if dry_run is not None:
        if out is not None:
            raise ConfigError(f"--out takes the best way of a plan, and --dry-run makes none; leave --out {out} away")
        raise typer.Exit(command.run_dry(config, overrides or [], question, dry_run, as_json=as_json))
    command.run(config, overrides or [], question, as_json=as_json, out=out)


profile_app = typer.Typer(help="Measure what a layer or a model costs, and where the time goes.", no_args_is_help=True)
app.add_typer(profile_app, name="profile")

Several = Annotated[str | None, typer.Option(help="One value, or several with commas: a sweep.", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for records.jsonl.", show_default=False)]
Rounds = Annotated[int | None, typer.Option("--rounds", help="Turns that each step takes.", show_default=False)]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads of a process.", show_default=False)]
Backward = Annotated[
    bool | None, typer.Option("--backward/--inference", help="Training steps, or forward passes.", show_default=False)
]


@profile_app.command("layer")
def profile_layer(
    sweep: Annotated[Path | None, typer.Argument(help="A sweep as a file; see configs/profile/.")] = None,
    tokens: Several = None,
    dim: Several = None,
    hidden: Several = None,
    experts: Several = None,
    top_k: Several = None,
    capacity: Several = None,
    dispatcher: Several = None,
    ep_size: Several = None,
    weight_group: Several = None,
    exchange: Several = None,
    local_size: Several = None,
    chunks: Several = None,
    payload: Several = None,
    skew: Several = None,
    precision: Several = None,
    rounds: Rounds = None,
    threads: Threads = None,
    backward: Backward = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Also a trace of a step of each, for Perfetto.")] = None,
    out: Out = None,
) -> None:
    """Time expert layers beside a dense MLP of equal active FLOPs, phase by phase; under any launcher."""
    from swinmoe.commands import profile as command

    options = {
        "tokens": tokens,
        "dim": dim,
        "hidden": hidden,
        "experts": experts,
        "top_k": top_k,
        "capacity": capacity,
        "dispatcher": dispatcher,
        "ep_size": ep_size,
        "weight_group": weight_group,
        "exchange": exchange,
        "local_size": local_size,
        "chunks": chunks,
        "payload": payload,
        "skew": skew,
        "precision": precision,
    }
    plain = {"rounds": rounds, "threads": threads, "backward": backward}
    command.run_layer(sweep, options, plain=plain, out=out, trace=trace)


@profile_app.command("model")
def profile_model(
    config: Annotated[Path, typer.Argument(help="A run's YAML file, or a sweep of configs/profile/.")],
    overrides: Overrides = None,
    vary: Annotated[
        list[str] | None, typer.Option("--vary", help="KEY=A,B,...: a sweep over a setting; may be given again.")
    ] = None,
    rounds: Rounds = None,
    threads: Threads = None,
    backward: Backward = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Also a trace of a step of each, for Perfetto.")] = None,
    out: Out = None,
) -> None:
    """Time a run's training or inference steps beside its dense twin's, phase by phase; under any launcher."""
    from swinmoe.commands import profile as command

    plain = {"rounds": rounds, "threads": threads, "backward": backward}
    command.run_model(config, overrides or [], vary or [], plain=plain, out=out, trace=trace)


@profile_app.command("exchange")
def profile_exchange(
    sweep: Annotated[Path | None, typer.Argument(help="A sweep as a file; see configs/profile/.")] = None,
    size: Annotated[
        str | None, typer.Option("--bytes", help="From each rank for each: 4KiB,64KiB,1MiB.", show_default=False)
    ] = None,
    skew: Annotated[
        str | None, typer.Option(help="Shares of the rows that all go to one rank: 0,0.5,0.9.", show_default=False)
    ] = None,
    exchange: Several = None,
    local_size: Several = None,
    chunks: Several = None,
    payload: Several = None,
    ep_size: Several = None,
    dim: Annotated[int | None, typer.Option("--dim", help="Width of a row.", show_default=False)] = None,
    rounds: Rounds = None,
    threads: Threads = None,
    backward: Annotated[
        bool | None, typer.Option("--backward/--forward", help="Both ways, or one.", show_default=False)
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Also a trace of the smallest exchanges, for Perfetto.")
    ] = None,
    out: Out = None,
) -> None:
    """Time the all-to-all of expert layers by itself, and fit latency and bandwidth; needs a launcher."""
    from swinmoe.commands import profile_exchange as command

    options = {
        "bytes": size,
        "skew": skew,
        "exchange": exchange,
        "local_size": local_size,
        "chunks": chunks,
        "payload": payload,
        "ep_size": ep_size,
    }
    plain = {"dim": dim, "rounds": rounds, "threads": threads, "backward": backward}
    command.run(sweep, options, plain=plain, out=out, trace=trace)


tune_app = typer.Typer(help="Find settings by measuring, and check them.", no_args_is_help=True)
app.add_typer(tune_app, name="tune")


@tune_app.command("capacity")
def tune_capacity(
    ckpt: Trained,
    rest: Rest = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", help="The share of its choices that a layer may drop, e.g. 0.01.")
    ] = None,
    within: Annotated[
        float | None, typer.Option("--within", help="Or: the fastest within so many points of accuracy, e.g. 0.5.")
    ] = None,
    mode: Annotated[str, typer.Option("--mode", help="Whose capacity: train, eval or both.")] = "both",
    images: Annotated[int, typer.Option("--images", help="Images of each mode; half to choose, half to check.")] = 2048,
    processes: Annotated[
        int | None,
        typer.Option("--processes", help="That will share a batch: capacity is counted for each. Default: as started."),
    ] = None,
    factors: Annotated[
        str | None, typer.Option("--factors", help="Of the curves, and the most that is recommended.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Of every timing.")] = 7,
    out: Out = None,
    weights: Weights = "auto",
) -> None:
    """A capacity factor for every expert layer from data, measured and checked. Exit status 1: not what was asked.

    Under a launcher each process runs its own batches, with experts spread as in training.
    """
    from swinmoe.commands import tune as command

    options = command.CapacityOptions(
        asked=command.parse_asked(max_drop, within),
        mode=mode,
        images=images,
        processes=processes,
        factors=command.parse_grid(factors),
        rounds=rounds,
    )
    raise typer.Exit(command.run_capacity(ckpt, rest or [], options, which=weights, out=out))


@tune_app.command("exchange")
def tune_exchange(
    config: Config,
    overrides: Overrides = None,
    processes: Annotated[
        int | None, typer.Option("--processes", help="So many on this machine's CPU; or use a launcher.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Of every comparison.")] = 9,
    backward: Annotated[bool, typer.Option("--training/--inference", help="Whole steps, or forward passes.")] = True,
    ep_sizes: Annotated[
        str | None, typer.Option("--ep-sizes", help="Only these, e.g. where all experts do not fit on a rank.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Where the best of every shape is remembered.", show_default=False)
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what is remembered anew.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="A YAML file: CONFIG with the best on top.")] = None,
) -> None:
    """Layout, chunks, 2DH, tokens or weights, ep_size: whatever makes a step fastest here, under any launcher."""
    from swinmoe.commands import tune_exchange as command

    options = command.ExchangeOptions(rounds, backward, command.parse_ep_sizes(ep_sizes), cache, again)
    raise typer.Exit(command.run_exchange(config, overrides or [], options, processes=processes, out=out))


verify_app = typer.Typer(help="Prove that results do not depend on how they were computed.", no_args_is_help=True)
app.add_typer(verify_app, name="verify")


@verify_app.command("parallel")
def verify_parallel(
    config: Config,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", help="Optimiser steps.")] = 10,
    processes: Annotated[
        int | None,
        typer.Option("--processes", help="So many on this machine's CPU; default ep_size, at least 2. Or a launcher."),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    full_size: Annotated[bool, typer.Option("--full-size", help="The config's own model, not a small one.")] = False,
) -> None:
    """Train a few steps on several processes and on one, and compare every gradient. Exit status 1: they differ."""
    from swinmoe.commands import verify as command

    status = command.run(
        config, overrides or [], steps=steps, processes=processes, json_path=json_path, full_size=full_size
    )
    raise typer.Exit(status)


def main() -> None:
    """Entry point of the `swinmoe` command."""
    argv = sys.argv[1:]
    debug = "--debug" in argv
    try:
        app([word for word in argv if word != "--debug"])
    except _Stopped as stopped:
        _fail(stopped.__cause__ or stopped, debug=debug)
    except Exception as error:
        _fail(error, debug=debug)


EXIT_PREEMPTED = 75
"""sysexits.h's EX_TEMPFAIL."""


def explain(error: BaseException) -> tuple[int, str]:
    """Exit status and message for whatever ended a command."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, CollectiveError):
        return 1, str(error)
    if isinstance(error, Preempted):
        return EXIT_PREEMPTED, str(error)
    if isinstance(error, SwinMoEError):
        return 2, str(error)
    if isinstance(error, OSError):
        what = f"{error.strerror or error}" + (f": {str(error.filename)!r}" if error.filename else "")
        return 2, f"{what}; {_ADVICE.get(error.errno or 0, 'check the paths given, output_dir= among them')}"
    said = " ".join(str(error).split())
    return 1, (
        f"unexpected {type(error).__name__}: {said} (a bug, or the machine; run again with --debug for the traceback)"
    )


_NOT_ALLOWED = "choose an output_dir= that you may write to"
_FULL = "free some space, or choose an output_dir= on another disk"
_ADVICE = {
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: _NOT_ALLOWED,
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.ENOTDIR: "a file stands where a folder is needed; choose another output_dir= or name=",
    errno.EEXIST: "a file stands where a folder is needed; choose another output_dir= or name=",
    errno.ENAMETOOLONG: "choose a shorter name= or output_dir=",
}


def _fail(error: BaseException, *, debug: bool) -> Never:
    status, message = explain(error)
    if debug:
        traceback.print_exception(error)
    if os.environ.get("RANK"):
        from swinmoe.runtime import last_word

        said = last_word(message, consequence=isinstance(error, CollectiveError), interrupted=status == 130)
    else:
        said = message
    if said is not None:
        sys.stderr.write(f"swinmoe: {said}\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
