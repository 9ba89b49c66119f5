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
from typing import Annotated, Any, Never

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
