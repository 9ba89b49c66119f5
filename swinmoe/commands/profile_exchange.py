"""`swinmoe profile exchange`: what the all-to-all of expert layers takes by itself, and the link that explains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from swinmoe.commands.profile import (
    Line,
    check_what,
    command_line,
    flat,
    folder_of,
    several,
    tell_where,
    teller,
)
from swinmoe.config.io import build, read_yaml
from swinmoe.config.profile_exchange import ExchangeSweepConfig, listed_exchange
from swinmoe.profiling.exchange import bytes_said, profile_exchange
from swinmoe.profiling.session import profile_session
from swinmoe.report import interval_name

_WIDTH = 140
"""Columns where the output is no terminal."""


def run(
    sweep: Path | None,
    options: Mapping[str, str | None],
    *,
    plain: Mapping[str, Any],
    out: Path | None = None,
    trace: Path | None = None,
) -> None:
    """Measure exchanges, print a table and the fits, write records.

    Args:
        sweep: a file of settings; `options` are laid on top.
        options: by field, as text: one value or several with commas between.
        plain: the other fields that were given.
        out: folder of the records; None = `output_dir/name` of `sweep`, or nowhere without one.
        trace: a file for one more of each exchange of the smallest size.
    """
    tree: dict[str, Any] = {} if sweep is None else read_yaml(sweep)
    check_what(tree, "exchange", sweep)
    tree |= {key: several(text) for key, text in options.items() if text is not None}
    tree |= {key: value for key, value in plain.items() if value is not None}
    config = build(ExchangeSweepConfig, listed_exchange(tree))
    out = folder_of(out, sweep, config.output_dir, config.name)
    settings = {f.name: getattr(config, f.name) for f in fields(config)}
    lines: list[tuple[str, Line]] = []
    with profile_session(out, settings, config.threads) as session:
        session.begin("exchange", command_line(), flat(asdict(config)))
        measured = profile_exchange(config, session.device, teller(session), session.rank_file(trace))
        for kind, line in measured:
            session.records.write(kind, **line)
            lines.append((kind, line))
    if session.is_main:
        show(lines, Console(highlight=False))
        tell_where(out, session, trace)


def show(lines: list[tuple[str, Line]], console: Console) -> None:
    """Print exchanges and fits."""
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    measured = [line for kind, line in lines if kind == "measurement"]
    by_name = {line["name"]: line for line in measured}
    rounds = min((line["ms"]["rounds"] for line in measured), default=0)
    table = _table(
        "exchange", "ms", interval_name(rounds), "x flat", "MB sent", "algbw GB/s", "busbw GB/s", "busiest GB/s"
    )
    for line in measured:
        ms, base = line["ms"], by_name.get(line["baseline"] or "")
        table.add_row(
            line["name"],
            f"{ms['median']:.3f}",
            f"{ms['low']:.3f}-{ms['high']:.3f}",
            f"{ms['median'] / base['ms']['median']:.2f}" if base else "",
            f"{line['bytes_sent'] / 1e6:.3f}",
            f"{line['algbw'] / 1e9:.3f}",
            f"{line['busbw'] / 1e9:.3f}",
            f"{line['busiest_bytes'] / ms['median'] * 1e3 / 1e9:.3f}",
        )
    console.print(table)
    fitted = [line for kind, line in lines if kind == "fit"]
    if not fitted:
        return
    table = _table("fit", "latency us", "GB/s", "half of it from", "typical error", "worst")
    for line in fitted:
        half = line["half_bandwidth_bytes"]
        table.add_row(
            line["name"],
            f"{line['latency_seconds'] * 1e6:.1f} ± {line['latency_error']:.0%}",
            f"{line['bandwidth'] / 1e9:.3f} ± {line['bandwidth_error']:.0%}" if line["bandwidth"] else "not seen",
            "" if half is None else bytes_said(half),
            f"{line['typical_error']:.1%}",
            f"{line['worst_error']:.1%}",
        )
    console.print(table)


def _table(first: str, *heads: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table
