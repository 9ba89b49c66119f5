"""Our weights in the files of others.

Dense models for Microsoft's code, timm, torchvision and Hugging Face; sparse ones in the files of each rank, as Tutel
and Microsoft's Swin-MoE read them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from swinmoe.checkpoint.huggingface import HUGGINGFACE_V1, HUGGINGFACE_V2, huggingface_config
from swinmoe.checkpoint.microsoft import MICROSOFT
from swinmoe.checkpoint.rules import Layout
from swinmoe.checkpoint.tensor_file import Shape, TensorWriter
from swinmoe.checkpoint.timm import TIMM
from swinmoe.checkpoint.torchvision import TORCHVISION_V1, TORCHVISION_V2
from swinmoe.checkpoint.tutel import SWIN_MOE, split_master, split_ranks
from swinmoe.config import STYLES, ModelConfig, resolve_style
from swinmoe.errors import CheckpointError
from swinmoe.models import SwinTransformer
from swinmoe.models.stage import offset_reference, stage_window

Format = Literal["microsoft", "timm", "torchvision", "huggingface", "tutel", "tutel-master"]
FORMATS: tuple[Format, ...] = get_args(Format)

File = str | Mapping[str, Any]
"""Text; or tensors by name, for a pickle also one level deeper."""

_DENSE: dict[str, tuple[Layout, Layout]] = {
    "microsoft": (MICROSOFT, MICROSOFT),
    "timm": (TIMM, TIMM),
    "torchvision": (TORCHVISION_V1, TORCHVISION_V2),
    "huggingface": (HUGGINGFACE_V1, HUGGINGFACE_V2),
}


def export_state(model: SwinTransformer, to: Format) -> dict[str, Tensor]:
    """A dense model's weights under another library's names.

    Raises:
        CheckpointError: the model is not what that library builds; says in what it differs.
    """
    version = _check(model.config, to)
    state, unknown = _DENSE[to][version == "v2"].write(_state(model))
    if unknown:
        raise CheckpointError(f"{to} has no place for {unknown[:6]}; save the model as swinmoe's own")
    return state


def export_ranks(
    model: SwinTransformer, num_ranks: int, *, master: bool = False
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor] | None]:
    """A sparse model's files by rank in Tutel's present shapes; with `master` also the shared one, as Microsoft ends.

    Raises:
        CheckpointError: the model is not what Microsoft's Swin-MoE builds, or cannot be shared by so many ranks.
    """
    _check_sparse(model.config)
    state, unknown = SWIN_MOE.write(_state(model))
    if unknown:
        raise CheckpointError(f"Tutel has no place for {unknown[:6]}; save the model as swinmoe's own")
    files = split_ranks(state, num_ranks)
    return split_master(files) if master else (files, None)


def write_export(model: SwinTransformer, folder: Path, to: Format, *, num_ranks: int = 1) -> list[Path]:
    """Write the files that another library reads into `folder`; returns their paths.

    Raises:
        CheckpointError: see `export_state`, `export_ranks` and `write_files`.
    """
    if to in ("tutel", "tutel-master"):
        ranks, shared = export_ranks(model, num_ranks, master=to == "tutel-master")
        files: dict[str, File] = {f"model.pth.rank{rank}": {"model": state} for rank, state in enumerate(ranks)}
        if shared is not None:
            files["model.pth.master"] = {"model": shared}
    else:
        state = export_state(model, to)
        name = "model.pth" if to in ("microsoft", "torchvision") else "model.safetensors"
        files = {name: {"model": state} if to == "microsoft" else state}
    if to == "huggingface":
        files["config.json"] = json.dumps(huggingface_config(model.config), indent=2) + "\n"
    return write_files(folder, files)


def write_files(folder: Path, files: Mapping[str, File]) -> list[Path]:
    """Write files of weights (`.safetensors`, or else pickled) and of text; returns their paths.

    All are written aside first, and renamed when the last is whole: what fails leaves `folder` as it was.

    Raises:
        CheckpointError: the disk is full or not writable; names the file.
    """
    fresh = not folder.exists()
    aside = {folder / name: folder / f".writing-{name}" for name in files}
    now = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for (now, path), content in zip(aside.items(), files.values(), strict=True):
            path.unlink(missing_ok=True)
            _write(path, now.suffix, content)
        for now, path in aside.items():
            path.replace(now)
    except BaseException as error:
        with suppress(OSError):
            for path in aside.values():
                path.unlink(missing_ok=True)
            if fresh:
                folder.rmdir()
        # torch has its own name for a disk that takes no more.
        if isinstance(error, OSError | RuntimeError):
            raise CheckpointError(
                f"could not write {str(now)!r}: {error}; free space or choose another folder"
            ) from error
        raise
    return list(aside)


def _write(path: Path, suffix: str, content: File) -> None:
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
        return
    if suffix != ".safetensors":
        with path.open("wb") as file:
            torch.save(_contiguous(content), file)
            file.flush()
            os.fsync(file.fileno())
        return
    tensors = {name: tensor for name, tensor in _contiguous(content).items() if isinstance(tensor, Tensor)}
    writer = TensorWriter(path, {name: Shape(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    try:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.close()
    finally:
        writer.abandon()


def _contiguous(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tree[key].contiguous() if isinstance(tree[key], Tensor) else _contiguous(tree[key]) for key in tree}


def _state(model: SwinTransformer) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def _check(cfg: ModelConfig, to: str) -> str:
    """The version, v1 or v2, that the model is in that library."""
    style = resolve_style(cfg.style)
    version = next((name for name in ("v1", "v2") if STYLES[name] == style), None)
    windows = [stage_window(cfg, stage) for stage in range(len(cfg.depths))]
    references = [offset_reference(cfg, stage) for stage in range(len(cfg.depths))]
    square = all(a == b for a, b in (cfg.img_size, cfg.patch_size, cfg.window_size))
    reasons = {
        "it has experts (use tutel)": cfg.moe is not None,
        f"its style is neither v1 nor v2 ({style})": version is None,
        "its MLPs have no second bias (mlp_fc2_bias: false)": not cfg.mlp_fc2_bias,
        "it has extra norms (extra_norm_every)": cfg.extra_norm_every > 0,
        "it has absolute positions": cfg.absolute_pos_embed and to in ("torchvision", "huggingface"),
        "it has no patch norm": not cfg.patch_norm and to in ("torchvision", "huggingface"),
        "its image, patch or window is not square": not square and to == "huggingface",
        "it has no biases for q, k, v": not cfg.qkv_bias and to == "torchvision",
        "its offsets are normalised by another window (pretrained_window_sizes)": to == "torchvision"
        and version == "v2"
        and references != windows,
        "a stage's window is smaller than the first's, since its map is": len(set(windows)) > 1
        and (to == "torchvision" or (to == "huggingface" and version == "v1")),
        "it has no head": cfg.num_classes == 0 and to == "huggingface",
    }
    if any(reasons.values()):
        found = "; ".join(reason for reason, holds in reasons.items() if holds)
        raise CheckpointError(f"{to} builds no such model: {found}; save it as swinmoe's own (--to swinmoe)")
    return str(version)


def _check_sparse(cfg: ModelConfig) -> None:
    moe = cfg.moe
    reasons = {
        "it has no experts": moe is None,
        "its style is not swin_moe": resolve_style(cfg.style) != STYLES["swin_moe"],
        "it has extra norms (extra_norm_every)": cfg.extra_norm_every > 0,
    }
    if moe is not None:
        reasons |= {
            "its experts are not GELU's": moe.experts.type != "gelu",
            "its experts lack a bias": not moe.experts.fc1_bias or moe.experts.fc2_bias == "none",
            "it has a shared expert": moe.shared_expert_ratio > 0,
            "its router is of another type": moe.router.type not in ("linear", "cosine"),
            "its router balances by biases": moe.router.bias_update_rate > 0,
            "its gates are sigmoids": moe.router.score != "softmax",
            "its experts are not as wide as its MLPs": moe.experts.hidden_ratio not in (None, 1.0),
        }
    if any(reasons.values()):
        found = "; ".join(reason for reason, holds in reasons.items() if holds)
        raise CheckpointError(f"Microsoft's Swin-MoE builds no such model: {found}; save it as swinmoe's own")
