"""`swinmoe convert`: weights of others into a model's folder, and models into the files of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from swinmoe.checkpoint.convert import model_of
from swinmoe.checkpoint.export import FORMATS, Format, write_export, write_files
from swinmoe.checkpoint.load_report import LoadReport
from swinmoe.checkpoint.pretrained import save_pretrained
from swinmoe.checkpoint.released import released
from swinmoe.checkpoint.source import Source, Which, read_source
from swinmoe.commands.saving import check_free, said_of
from swinmoe.config.io import parse_overrides
from swinmoe.errors import ConfigError, did_you_mean


def run(
    words: Sequence[str],
    *,
    to: str = "swinmoe",
    preset: str | None = None,
    allow: Sequence[str] = (),
    class_map: Path | None = None,
    ranks: int = 1,
    which: Which = "auto",
) -> None:
    """Convert, and print what became of every tensor.

    Args:
        words: files or a folder, then the new folder, then `key=value` settings of the model.
        to: `swinmoe`, or one of `FORMATS`.
        preset: the named model that the weights belong to; None = as the files tell.
        allow: patterns of names that need not fit.
        class_map: a file with, for each class of the model, its index among the source's.
        ranks: for Tutel's files, how many processes will read them.
        which: of a run's checkpoint the weights or their moving average; `auto`: the average if there is one.

    Raises:
        ConfigError: a format, preset or setting that does not exist, or no source or no destination.
        CheckpointError: the source cannot be read or does not fit; or the destination is in use.
    """
    formats = ("swinmoe", *FORMATS)
    if to not in formats:
        raise ConfigError(f"--to {to}: use one of {', '.join(formats)}{did_you_mean(to, formats)}")
    settings = [word for word in words if "=" in word and not Path(word).exists()]
    paths = [Path(word) for word in words if word not in settings]
    if len(paths) < 2:
        raise ConfigError(
            "swinmoe convert needs a source and a new folder, e.g. swinmoe convert swin_tiny.pth swin_tiny"
        )
    *given, target = paths
    check_free(target)
    source = read_source(given, allow, which)
    console = Console(soft_wrap=True)
    if to == "swinmoe" and "patch_embed.proj.weight" not in source.named:
        _save_layer(source, target, allow)
        console.print(f"{source.label}: an expert layer by itself ({source.layout}); wrote {target}/model.safetensors")
        return
    model, report = model_of(
        source, preset=preset, overrides=parse_overrides(settings), allow=allow, class_map=class_map
    )
    if to == "swinmoe":
        save_pretrained(model, target)
    else:
        write_export(model, target, _format(to), num_ranks=ranks)
    console.print(f"layout {source.layout} -> {to}, written to {target}", highlight=False, markup=False)
    if source.config is not None:
        console.print(said_of(source), highlight=False, markup=False)
    kept = replace(report, unused=tuple(name for name in report.unused if name not in source.derived))
    console.print(kept.summary(), highlight=False, markup=False)
    if source.derived:
        count = len(source.derived)
        console.print(f"  {count} left aside that follow from the configuration: {', '.join(source.derived[:2])} ...")


def list_released(contains: str) -> None:
    """Print the published files whose name or family contains `contains`, and how to convert each."""
    found = [item for item in released() if contains in item.name or contains in item.family]
    if not found:
        families = sorted({item.family for item in released()})
        raise ConfigError(f"no published file contains {contains!r}; families: {', '.join(families)}")
    console = Console(soft_wrap=True)
    for item in found:
        size = "size not published" if item.size is None else f"{item.size} bytes"
        digest = "hash not published" if item.sha256 is None else f"sha256 {item.sha256}"
        for line in (f"{item.family}: {item.name} ({size}, {digest})", f"  {item.url}", f"  {item.command()}"):
            console.print(line, highlight=False, markup=False)


def _format(to: str) -> Format:
    return next(name for name in FORMATS if name == to)


def _save_layer(source: Source, target: Path, allow: Sequence[str]) -> None:
    """Expert layers without a model around them, by their names in files; there is no configuration to save."""
    LoadReport(source=source.label, loaded=tuple(source.named), unused=source.unused).check(allow)
    write_files(target, {"model.safetensors": source.named})
