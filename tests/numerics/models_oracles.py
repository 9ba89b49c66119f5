"""Test-only helpers: weights overwritten everywhere, and our weights under other libraries' names."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

SIZES = {
    "t": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "s": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "b": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
}


@torch.no_grad()
def overwrite(model: nn.Module, seed: int = 1) -> None:
    """Every parameter drawn anew, so that no zero-initialised norm or bias hides a difference."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        if name.endswith("logit_scale"):  # around the usual ln 10, the first head above ln 100, where it is clamped
            value = math.log(10) + 0.5 * noise
            value[0] = 5.0
        elif "norm" in name and name.endswith("weight"):
            value = 1 + 0.1 * noise
        elif parameter.dim() > 1 and name.endswith("weight"):
            value = noise / math.sqrt(parameter[0].numel())
        elif name.endswith("bias"):
            value = 0.2 * noise
        else:  # position tables
            value = noise
        parameter.copy_(value)


def exact_offsets(window: tuple[int, int]) -> np.ndarray:
    """The published formula of log-spaced offsets in float64, (2wh-1, 2ww-1, 2)."""
    out = np.zeros((2 * window[0] - 1, 2 * window[1] - 1, 2))
    for i in range(2 * window[0] - 1):
        for j in range(2 * window[1] - 1):
            for axis, (offset, side) in enumerate(((i - window[0] + 1, window[0]), (j - window[1] + 1, window[1]))):
                scaled = 8.0 * offset / (side - 1)
                out[i, j, axis] = math.copysign(math.log2(1 + abs(scaled)), scaled) / math.log2(8)
    return out


def sharpen_offsets(model: nn.Module) -> None:
    """Replace another library's offsets, rounded to float32, by exact ones, after checking that they lack no more."""
    for module in model.modules():
        table = getattr(module, "relative_coords_table", None)
        if isinstance(table, Tensor):
            rows, cols = table.shape[1:3]
            exact = torch.from_numpy(exact_offsets(((rows + 1) // 2, (cols + 1) // 2)))[None]
            assert (table.double() - exact).abs().max() < 1e-6
            table.data = exact.to(table.dtype)


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names to timm's: merging opens the next stage there, and the head is called head.fc."""
    out = {}
    for name, value in state.items():
        parts = name.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) + 1)
        if parts[0] == "head":
            parts.insert(1, "fc")
        out[".".join(parts)] = value
    return out


def to_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names to torchvision's; its V2 keeps one qkv bias, whose middle third it zeroes when used."""
    out = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[-1] == "v_bias":
            continue
        if parts[-1] == "q_bias":
            v_bias = state[name.replace("q_bias", "v_bias")]
            value, parts = torch.cat((value, torch.zeros_like(value), v_bias)), [*parts[:-1], "qkv", "bias"]
        if parts[0] == "patch_embed":
            parts[:2] = ["features", "0", "0" if parts[1] == "proj" else "2"]
        elif parts[0] == "layers" and parts[2] == "blocks":
            parts[:3] = ["features", str(2 * int(parts[1]) + 1)]
            parts = ["0" if p == "fc1" else "3" if p == "fc2" else p for p in parts]
        elif parts[0] == "layers":
            parts[:3] = ["features", str(2 * int(parts[1]) + 2)]
        out[".".join(parts)] = value
    return out


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference."""
    return float((ours - theirs).abs().max())
