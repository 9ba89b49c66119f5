"""The command line: argv -> (command, typed config) -> run. Errors for users are one message and exit status 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from swinmoe.errors import SwinMoEError
from swinmoe.version import __version__

app = typer.Typer(
    name="swinmoe",
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
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """`--debug` is read by `main`, which needs it after parsing has failed too."""


# Commands import their work when called, so that `swinmoe --help` and bad arguments answer at once.


@app.command()
def train(config: Config, overrides: Overrides = None, shrink: Shrink = False) -> None:
    """Train one model from a config."""
    from swinmoe.commands import train as command

    command.run(config, overrides or [], shrunk=shrink)


@app.command()
def compare(config: Config, overrides: Overrides = None, shrink: Shrink = False) -> None:
    """Train dense and sparse twins side by side and write a report."""
    from swinmoe.commands import compare as command

    command.run(config, overrides or [], shrunk=shrink)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run's output folder.", show_default=False)]) -> None:
    """Write a run's report again from its records."""
    from swinmoe.commands import report as command

    command.run(folder)


@app.command()
def models(contains: Annotated[str, typer.Argument(help="Only names that contain this.")] = "") -> None:
    """List the named models with their parameters and FLOPs."""
    from swinmoe.commands import models as command

    command.run(contains)


def main() -> None:
    """Entry point of the `swinmoe` command."""
    try:
        app(standalone_mode=True)
    except SwinMoEError as error:
        if "--debug" in sys.argv:
            raise
        sys.stderr.write(f"swinmoe: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
