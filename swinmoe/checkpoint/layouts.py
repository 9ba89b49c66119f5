"""Which layout a set of names has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from swinmoe.checkpoint import mmdet
from swinmoe.checkpoint.huggingface import HUGGINGFACE_V1, HUGGINGFACE_V1_BARE, HUGGINGFACE_V2, HUGGINGFACE_V2_BARE
from swinmoe.checkpoint.microsoft import DERIVED, MICROSOFT
from swinmoe.checkpoint.rules import Layout, rename
from swinmoe.checkpoint.timm import TIMM
from swinmoe.checkpoint.torchvision import TORCHVISION_V1, TORCHVISION_V2
from swinmoe.checkpoint.tutel import SWIN_MOE, TUTEL
from swinmoe.errors import CheckpointError

OURS = Layout("swinmoe", rename([("{rest}", "{rest}")]), DERIVED)
"""Our own names, of models and of expert layers by themselves."""

_SIGNS = (
    ("features.0.0.weight", "torchvision"),
    ("swin.embeddings.patch_embeddings.projection.weight", "huggingface"),
    ("swinv2.embeddings.patch_embeddings.projection.weight", "huggingface"),
    ("embeddings.patch_embeddings.projection.weight", "huggingface-bare"),
    ("stages.0.blocks.0.attn.w_msa.qkv.weight", "mmdet"),
    ("patch_embed.proj.weight", "backbone"),
)
"""A name that a layout has, and the family it belongs to; the first that occurs, after any prefix, decides."""


def recognise(state: Mapping[str, Tensor], label: str) -> tuple[Layout, dict[str, Tensor]]:
    """The layout of a state dict, and the state without the prefix (`module.`, `backbone.`, `encoder.`) it has.

    Raises:
        CheckpointError: names that belong to no layout known here.
    """
    for sign, family in _SIGNS:
        for name in state:
            if name == sign or name.endswith("." + sign):
                stripped = _strip(state, name.removesuffix(sign), label)
                return _member(family, stripped), stripped
    if any(re.search(r"(^|\.)experts\.batched_fc1_w$", name) for name in state):
        return TUTEL, dict(state)
    if any(re.search(r"(^|\.)experts\.(\d+\.fc1\.|fc1_)weight$", name) for name in state):
        return OURS, dict(state)
    raise CheckpointError(
        f"{label} has names of no layout known here ({', '.join(sorted(state)[:4])} ...); known are swinmoe's own, "
        "Microsoft's (Swin V1, V2, SimMIM, Swin-MoE), timm's, torchvision's, Hugging Face's swin and swinv2, mmdet's "
        "V1 and Tutel's layers"
    )


def _member(family: str, state: Mapping[str, Tensor]) -> Layout:
    cosine = any(name.endswith(".logit_scale") for name in state)
    if family == "torchvision":
        return TORCHVISION_V2 if cosine else TORCHVISION_V1
    if family == "huggingface":
        return HUGGINGFACE_V2 if cosine else HUGGINGFACE_V1
    if family == "huggingface-bare":
        return HUGGINGFACE_V2_BARE if cosine else HUGGINGFACE_V1_BARE
    if family == "mmdet":
        if cosine:
            raise CheckpointError("OpenMMLab's Swin V2 is not known here, only its V1; convert from Microsoft's file")
        return mmdet.layout(1 + max(_numbers(state, r"stages\.(\d+)\..*")))
    if any("._moe_layer." in name for name in state):
        return SWIN_MOE
    if any(re.search(r"\.(experts|shared)\.(\d+\.fc1\.|fc1_)weight$", name) for name in state):
        return OURS
    merges = _numbers(state, r"layers\.(\d+)\.downsample\..*")
    opens = bool(merges) and 0 not in merges
    return TIMM if opens or "head.fc.weight" in state else MICROSOFT


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    return {int(found[1]) for name in names if (found := re.fullmatch(pattern, name))}


def _strip(state: Mapping[str, Tensor], prefix: str, label: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        short = name.removeprefix(prefix)
        if short in out:
            raise CheckpointError(f"{label} has both {short!r} and {prefix + short!r}; remove one")
        out[short] = tensor
    return out
