"""`load_pretrained`: anybody's weights into a model, and a report of what became of each tensor."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from swinmoe.checkpoint import resize
from swinmoe.checkpoint.load_report import LoadReport
from swinmoe.checkpoint.naming import to_files
from swinmoe.checkpoint.source import Source, SourceLike, Which, read_source
from swinmoe.config import ModelConfig, resolve_style
from swinmoe.errors import CheckpointError
from swinmoe.models import SwinTransformer
from swinmoe.models.stage import offset_reference, stage_map, stage_window
from swinmoe.parallel import is_expert_parameter

Pair = tuple[int, int]
ClassMap = str | Path | Sequence[int]


def load_pretrained(
    model: nn.Module,
    source: SourceLike | Source,
    *,
    allow: Sequence[str] = (),
    class_map: ClassMap | None = None,
    which: Which = "auto",
) -> LoadReport:
    """Load weights into a model, a `SwinTransformer` or an expert layer by itself, whatever names they have.

    What differs by window, image size, channels or (with `class_map`) classes is resized. Where the position bias is a
    function of log-spaced offsets, the model takes over the window by which the source normalised them. Everything else
    must fit, or be allowed by name. Weights take the model's floating type, which the report tells where it differs.

    Args:
        model: its parameters are overwritten, and left alone if anything is wrong.
        source: a state dict; a file; a list of files; a folder; see `swinmoe.checkpoint.source`.
        allow: patterns (`head.*`) of names that may be missing, unused, or of another shape, which are left at their
            initial values; `ranks:` before a pattern lets what ranks share differ between their files.
        class_map: for each class of the model its index among the source's, as numbers or a file of one a line.
        which: of a run's checkpoint the weights or their moving average; `auto`: the average if there is one.

    Returns:
        The report, checked.

    Raises:
        CheckpointError: the source cannot be read, or does not fit, by name.
    """
    if any(is_expert_parameter(parameter) for parameter in model.parameters()):
        raise CheckpointError(
            "the model's experts are spread over ranks already; load the weights first and spread the model afterwards"
        )
    found = source if isinstance(source, Source) else read_source(source, allow, which)
    targets = {name: tensor.detach() for name, tensor in to_files(model.state_dict(keep_vars=True)).items()}
    fitted, resized = _fit(model, found, targets, class_map)
    wrong = {name: how for name, how in resized.items() if name not in fitted}
    refused = {name: how for name, how in wrong.items() if not _allowed(name, allow)}
    if refused:
        raise CheckpointError(
            f"{found.label} does not fit: "
            + "; ".join(f"{name} {how}" for name, how in list(refused.items())[:6])
            + (f" and {len(refused) - 6} more" if len(refused) > 6 else "")
            + "; use a model of the source's sizes, or allow these by name to leave them at their initial values "
            f"({_how_to_allow(refused)})"
        )
    references = _take_references(model, found, allow)
    report = LoadReport(
        source=found.label,
        loaded=tuple(name for name in fitted if name not in resized),
        resized={name: how for name, how in resized.items() if name in fitted} | references,
        reinitialised=wrong,
        unused=(*found.unused, *(name for name in found.named if name not in targets)),
        missing=tuple(name for name in targets if name not in found.named),
    ).check(allow)
    _commit(model, targets, fitted, references, found)
    return replace(report, unused=(*report.unused, *found.derived))


def _commit(
    model: nn.Module, targets: dict[str, Tensor], fitted: dict[str, Tensor], references: dict[str, str], found: Source
) -> None:
    with torch.no_grad():
        for name, tensor in fitted.items():
            targets[name].copy_(tensor)
    if references and isinstance(model, SwinTransformer):
        windows = source_references(found, model.config)
        model.config = replace(model.config, pretrained_window_sizes=plain_windows(windows))
        model.prepare_tables()


def _fit(
    model: nn.Module, found: Source, targets: dict[str, Tensor], class_map: ClassMap | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What can be loaded, and what was changed or cannot be: name -> how."""
    fitted: dict[str, Tensor] = {}
    notes = {name: how for name, how in found.changed.items() if name in targets}
    for name, tensor in found.named.items():
        if name not in targets:
            continue
        target, shape = targets[name], tuple(targets[name].shape)
        if tensor.is_floating_point() != target.is_floating_point() or tensor.is_complex():
            notes[name] = f"is {plain(tensor.dtype)} in the source and {plain(target.dtype)} in the model"
            continue
        if tuple(tensor.shape) == shape and not _other(model, found, name, class_map):
            fitted[name] = tensor
        else:
            done = _resize(model, found, name, tensor, shape, class_map)
            if done is None or tuple(done[0].shape) != shape:
                notes[name] = f"is {tuple(tensor.shape)} in the source and {shape} in the model"
                continue
            fitted[name], notes[name] = done
        if tensor.dtype != target.dtype:
            cast = f"{plain(tensor.dtype)} -> {plain(target.dtype)}"
            notes[name] = f"{notes[name]}; {cast}" if name in notes else cast
    return fitted, notes


def plain(dtype: torch.dtype) -> str:
    """`float32`."""
    return str(dtype).removeprefix("torch.")


def _other(model: nn.Module, found: Source, name: str, class_map: ClassMap | None) -> bool:
    """True for a tensor of the right shape that stands for something else: other classes, offsets or places."""
    if name.startswith("head."):
        return class_map is not None
    if found.config is None or not isinstance(model, SwinTransformer):
        return False
    if name.endswith(".relative_position_bias_table"):
        stage = int(name.split(".")[1])
        return stage_window(found.config, stage) != stage_window(model.config, stage)
    return name == "absolute_pos_embed" and stage_map(found.config, 0) != stage_map(model.config, 0)


def _resize(
    model: nn.Module, found: Source, name: str, tensor: Tensor, shape: tuple[int, ...], class_map: ClassMap | None
) -> tuple[Tensor, str] | None:
    if name.startswith("head.") and class_map is not None:
        indices = resize.read_class_map(class_map, tensor.shape[0], shape[0])
        return tensor[indices], f"{tensor.shape[0]} classes -> {shape[0]} by the class map"
    if not isinstance(model, SwinTransformer):
        return None
    if name.endswith(".relative_position_bias_table") and tensor.shape[1] == shape[1]:
        stage = int(name.split(".")[1])
        known = None if found.config is None else stage_window(found.config, stage)
        old = resize.table_window(tensor, known)
        return None if old is None else resize.bias_table(tensor, old, stage_window(model.config, stage))
    if name == "absolute_pos_embed" and tensor.dim() == 3 and tensor.shape[2] == shape[2]:
        known_map = None if found.config is None else stage_map(found.config, 0)
        return resize.positions(tensor, stage_map(model.config, 0), known_map)
    if name == "patch_embed.proj.weight" and tensor.shape[2:] == shape[2:]:
        return resize.channels(tensor, shape[1])
    return None


def source_references(found: Source, config: ModelConfig) -> tuple[Pair, ...] | None:
    """Per stage the window by which the source's log-spaced offsets are normalised; None where nothing tells."""
    if resolve_style(config.style).position_bias == "table":
        return None
    if found.config is not None:
        return tuple(offset_reference(found.config, stage) for stage in range(len(found.config.depths)))
    windows = [_reference(found.aside, stage) for stage in range(len(config.depths))]
    return None if any(window is None for window in windows) else tuple(w for w in windows if w is not None)


def _reference(aside: dict[str, Tensor], stage: int) -> Pair | None:
    """From a stored table of offsets (1, 2·wh-1, 2·ww-1, 2), whose largest is log2(1 + 8(w - 1)/(r - 1))/3."""
    table = aside.get(f"layers.{stage}.blocks.0.attn.relative_coords_table")
    if table is None:
        return None
    sides = []
    for axis in (0, 1):
        window = (table.shape[1 + axis] + 1) // 2
        largest = float(table[..., axis].max()) if window > 1 else 0.0
        sides.append(1 if window == 1 else round(1 + 8 * (window - 1) / (2 ** (3 * largest) - 1)))
    return sides[0], sides[1]


def _take_references(model: nn.Module, found: Source, allow: Sequence[str]) -> dict[str, str]:
    """Stages whose offsets must be normalised as the source did it: name -> how; none where they are already."""
    if not isinstance(model, SwinTransformer):
        return {}
    config, given = model.config, source_references(found, model.config)
    if given is None:
        return {}
    now = [offset_reference(config, stage) for stage in range(len(config.depths))]
    changed = {
        f"layers.{stage}.offsets": f"normalised by window {old[0]}x{old[1]}, as in pre-training"
        for stage, (old, new) in enumerate(zip(given, now, strict=True))
        if old != new
    }
    chosen = config.pretrained_window_sizes is not None and any(
        min(w if isinstance(w, tuple) else (w,)) > 0 for w in config.pretrained_window_sizes
    )
    if changed and chosen:
        if _allowed("pretrained_window_sizes", allow):
            return {}
        raise CheckpointError(
            f"{found.label} was trained with position offsets normalised by windows "
            f"{list(plain_windows(given) or ())}, and the model's pretrained_window_sizes says "
            f"{list(config.pretrained_window_sizes or ())}: its position bias would be another function; leave "
            "pretrained_window_sizes at null, or allow it by that name"
        )
    return changed


def plain_windows(windows: tuple[Pair, ...] | None) -> tuple[int | Pair, ...] | None:
    """Windows as `pretrained_window_sizes` has them, square ones by their side."""
    return None if windows is None else tuple(w[0] if w[0] == w[1] else w for w in windows)


def _how_to_allow(refused: Collection[str]) -> str:
    """In words of the commands; heads of other classes are the usual case."""
    if all(name.startswith("head.") for name in refused):
        return "--allow 'head.*'; or map old classes to new ones: --class-map FILE"
    return f"--allow '{next(iter(refused))}' ..., or in a config finetune.allow"


def _allowed(name: str, allow: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in allow)
