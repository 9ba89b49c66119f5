"""`swinmoe profile`: what a layer or a model costs beside its dense form, and where the time goes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from swinmoe.config import RunConfig
from swinmoe.config.io import build, dump, load, merge, parse_overrides, read_yaml
from swinmoe.config.profile import LayerSweepConfig, ModelSweepConfig, listed
from swinmoe.errors import ConfigError
from swinmoe.profiling.breakdown import EXCHANGE
from swinmoe.profiling.layer import profile_layer
from swinmoe.profiling.model import profile_model
from swinmoe.profiling.session import ProfileSession, profile_session
from swinmoe.report import experts_said, interval_name, write_profile_report
from swinmoe.runtime import launched_rank

Line = dict[str, Any]
_WIDTH = 140
"""Columns where the output is no terminal."""


def run_layer(
    sweep: Path | None,
    options: Mapping[str, str | None],
    *,
    plain: Mapping[str, Any],
    out: Path | None,
    trace: Path | None = None,
) -> None:
    """Measure layers, print a table, write records.

    Args:
        sweep: a file of settings; `options` are laid on top.
        options: by field, as text: one value or several with commas between.
        plain: the other fields that were given.
        out: folder of the records; None = `output_dir/name` of `sweep`, or nowhere without one.
        trace: a file for one more step of each layer, in order.
    """
    tree: dict[str, Any] = {} if sweep is None else read_yaml(sweep)
    check_what(tree, "layer", sweep)
    tree |= {key: several(text) for key, text in options.items() if text is not None}
    tree |= {key: value for key, value in plain.items() if value is not None}
    config = build(LayerSweepConfig, listed(tree))
    out = folder_of(out, sweep, config.output_dir, config.name)
    settings = {f.name: getattr(config, f.name) for f in fields(config)}
    with profile_session(out, settings, config.threads) as session:
        session.begin("layer", command_line(), flat(asdict(config)))
        lines = record(session, profile_layer(config, session.device, teller(session), session.rank_file(trace)))
    if session.is_main:
        show(lines, Console(highlight=False))
        tell_where(out, session, trace)


def run_model(
    path: Path,
    overrides: list[str],
    vary: list[str],
    *,
    plain: Mapping[str, Any],
    out: Path | None,
    trace: Path | None = None,
) -> None:
    """Measure a run's steps beside its dense twin's, print a table, write records.

    Args:
        path: a run's file, or a sweep's (with `what: model`).
        overrides: `key=value` of the run.
        vary: `key=a,b` of the run, each a sweep.
        plain: the other fields that were given.
        out: folder of the records; None = `output_dir/name` of a sweep, or nowhere without one.
        trace: a file for one more step of each model of the first run.
    """
    tree = read_yaml(path)
    is_sweep = "what" in tree
    check_what(tree, "model", path)
    if not is_sweep:
        tree = {"run": str(path)}
    tree |= {key: value for key, value in plain.items() if value is not None}
    config = build(ModelSweepConfig, merge(tree, {"vary": dict(_varied(item) for item in vary)}))
    chosen = runs_of(config, overrides)
    out = folder_of(out, path if is_sweep else None, config.output_dir, config.name)
    settings = {name: dump(run) for name, run in chosen.runs.items()} | {
        "rounds": config.rounds,
        "backward": config.backward,
    }
    with profile_session(out, settings, config.threads) as session:
        session.begin("model", command_line(), flat(asdict(config)) | {"overrides": " ".join(overrides)})
        for why in chosen.left_out:
            teller(session)(f"left out: {why}")
        measured = profile_model(
            chosen.runs,
            session.device,
            backward=config.backward,
            rounds=config.rounds,
            say=teller(session),
            trace=session.rank_file(trace),
            varied=chosen.varied,
        )
        lines = record(session, measured)
    if session.is_main:
        show(lines, Console(highlight=False))
        for why in chosen.left_out:  # again: what was said before is far above by now
            teller(session)(f"left out: {why}")
        tell_where(out, session, trace)


def _varied(item: str) -> tuple[str, list[Any]]:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"--vary {item!r} is not of the form key=a,b, e.g. model.moe.num_experts=8,16")
    return key, several(text)


@dataclass(frozen=True)
class Combinations:
    """The runs of a sweep."""

    runs: dict[str, RunConfig]
    """By name."""
    varied: dict[str, dict[str, Any]]
    """Of each, what the sweep varies, as `key.of.run`: value."""
    left_out: list[str]
    """What cannot be, and why."""


def runs_of(config: ModelSweepConfig, overrides: list[str]) -> Combinations:
    """All combinations that can be, by name.

    Raises:
        ConfigError: none can be.
    """
    found = Combinations({}, {}, [])
    failure: ConfigError | None = None
    fixed = parse_overrides(overrides)
    for values in product(*config.vary.values()):
        chosen = dict(zip(config.vary, values, strict=True))
        over: dict[str, Any] = {}
        for key, value in (config.set | chosen).items():
            over = merge(over, _nested(key, value))
        said = [f"{key.rpartition('.')[2]} {value}" for key, value in chosen.items()]
        try:
            run = load(RunConfig, config.run, prepare=partial(_laid_on, over=merge(over, fixed)))
        except ConfigError as error:
            failure = error
            found.left_out.append(f"{', '.join(said)}: {error}")
            continue
        name = ", ".join([run.name, *said])
        found.runs[name], found.varied[name] = run, chosen
    if failure is not None and not found.runs:
        raise failure
    return found


def _laid_on(tree: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    return merge(tree, over)


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def check_what(tree: Mapping[str, Any], what: str, sweep: Path | None) -> None:
    """`ConfigError` if the file is another command's."""
    if tree.get("what", what) != what:
        raise ConfigError(f"config file {str(sweep)!r} is for swinmoe profile {tree['what']}, not {what}")


def several(text: str) -> list[Any]:
    """`8,32` as [8, 32], `[0,1],[0]` as [[0, 1], [0]]: what YAML has between brackets.

    Raises:
        ConfigError: it is no such list.
    """
    try:
        return list(yaml.safe_load(f"[{text}]"))
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise ConfigError(
            f"{text!r} is no list of values with commas between ({problem}); write 8,32 or, where a value is a list "
            "itself, [0,1],[0]"
        ) from error


def folder_of(out: Path | None, sweep: Path | None, output_dir: str, name: str) -> Path | None:
    """Where records go."""
    return out if out is not None or sweep is None else Path(output_dir) / name


def command_line() -> str:
    """What was typed, for the records."""
    return " ".join(["swinmoe", *sys.argv[1:]])


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of one as their value."""
    return {
        key: value[0] if isinstance(value, tuple | list) and len(value) == 1 else value for key, value in tree.items()
    }


def teller(session: ProfileSession) -> Callable[[str], None]:
    """Says on the main process what is being done."""
    console = Console(stderr=True, highlight=False, quiet=not session.is_main)
    return lambda text: console.print(text, markup=False, soft_wrap=True)


def record(session: ProfileSession, lines: Iterable[Line]) -> list[Line]:
    """Write each measurement as it comes."""
    kept = []
    for line in lines:
        session.records.write("measurement", **line)
        kept.append(line)
    return kept


def tell_where(out: Path | None, session: ProfileSession, trace: Path | None = None) -> None:
    """Write the page of the records, and name what was written."""
    written = session.rank_file(trace)
    if written is not None and session.is_main:
        each = "" if written == trace else ", and one for each other process"
        Console(stderr=True, highlight=False).print(
            f"trace: {written}{each}, for ui.perfetto.dev", markup=False, soft_wrap=True
        )
    if out is not None and launched_rank() == 0:
        records = out / "records.jsonl"
        page = write_profile_report([records], out)
        console = Console(stderr=True, highlight=False)
        console.print(f"records: {records}\nreport: {page.html}", markup=False, soft_wrap=True)


def show(lines: list[Line], console: Console) -> None:
    """Print measurements: times, shares and memory; phases, forward and backward together; exchanges."""
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    by_name = {line["name"]: line for line in lines}
    rounds = min((line["ms"]["rounds"] for line in lines), default=0)
    heads = ["ms", interval_name(rounds), "x dense", "balanced", "dropped", "padding", "of GEMM", "MB", "images/s"]
    rates = any("images_per_second" in line["ms"] for line in lines)
    table = _table("step", heads if rates else heads[:-1])
    for line in lines:
        ms, base, rows = line["ms"], by_name.get(line["baseline"] or ""), line.get("rows")
        cells = [f"{ms['median']:.2f}", f"{ms['low']:.2f}-{ms['high']:.2f}"]
        cells.append(f"{ms['median'] / base['ms']['median']:.2f}" if base else "")
        cells.append(_number(line.get("balanced_ms")))
        shares = (rows["kept"] / rows["routed"], rows["kept"] / rows["computed"]) if base and rows else ()
        cells += [f"{1 - share:.1%}" for share in shares] or ["", ""]
        cells += [f"{line['utilisation']['model']:.0%}", f"{line['memory']['peak'] / 1e6:.1f}"]
        table.add_row(line["name"], *cells, *([f"{ms['images_per_second']:.1f}"] if rates else []))
    console.print(table)
    for said in experts_said(lines):
        console.print(said, markup=False, soft_wrap=True)
    watched = [line for line in lines if line.get("phases")]
    if not watched:
        return
    found = {name for line in watched for name in phase_sums(line)}
    order = ["attention", "mlp", "route", "scatter", *EXCHANGE, "experts", "gather", "optimizer", "other"]
    names = [name for name in order if name in found]
    table = _table("ms in", [name.replace("exchange_", "exch. ") for name in names] + ["sum", "over ms"])
    for line in watched:
        sums, whole = phase_sums(line), line["instrumented_ms"]
        over = f"{whole / line['ms']['median'] - 1:+.1%}"  # what the marks cost, and the noise
        table.add_row(line["name"], *(_number(sums.get(name)) for name in names), _number(whole), over)
    console.print(table)
    for line in watched:
        if line.get("exchange_ms") is not None:
            console.print(
                f"{line['name']}: exchange alone {line['exchange_ms']:.2f} ms; exposed {line['exposed_ms']:.2f}, "
                f"hidden {line['hidden_ms']:.2f}; {line['exchange_bytes'] / 1e6:.2f} MB sent by a rank of "
                f"{line['ranks']}, {line['bandwidth'] / 1e6:.1f} MB/s",
                markup=False,
                soft_wrap=True,
            )


def _table(first: str, heads: list[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def phase_sums(line: Line) -> dict[str, float]:
    """Milliseconds of each phase, all passes together."""
    sums: dict[str, float] = {}
    for own in (line.get("phases") or {}).values():
        for name, ms in own.items():
            sums[name] = sums.get(name, 0.0) + ms
    return sums


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
