"""Weights and images that depend on names and a number only, so that recorded logits need no recorded weights.

Recorders (tests/data) and tests draw the same; numpy's RandomState gives the same values for ever.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

DATA = Path(__file__).parents[1] / "data"
DERIVED = ("relative_position_index", "relative_coords_table", "attn_mask", "_num_global_experts")


def draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A float32 tensor for a parameter of this name, whatever library it is of: nothing zero, norms around 1."""
    noise = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(shape)
    last = name.rsplit(".", 1)[-1]
    if last == "logit_scale":  # around the usual ln 10, the first head above ln 100, where it is clamped
        noise = math.log(10) + 0.5 * noise
        noise[0] = 5.0
    elif last == "temperature":
        noise = math.log(2) + 0.2 * noise
    elif "norm" in name and last == "weight":
        noise = 1 + 0.1 * noise
    elif last == "batched_fc2_w":
        noise = noise / math.sqrt(shape[-2])
    elif last == "batched_fc1_w":
        noise = noise / math.sqrt(shape[-1])
    elif "fc2_bias" in last:
        noise = np.zeros(shape)
    elif "bias" in last and "table" not in last:
        noise = 0.2 * noise
    elif last == "weight" and len(shape) > 1:
        noise = noise / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(noise).float()


def images(batch: int, side: int, seed: int, channels: int = 3) -> Tensor:
    """(batch, channels, side, side)."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((batch, channels, side, side))).float()


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def recorded(file: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and facts of a recording."""
    with safe_open(DATA / file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        return tensors, json.loads(opened.metadata()["facts"])
