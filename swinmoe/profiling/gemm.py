"""What this machine multiplies in the same minutes: the rate that utilisation is stated against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from swinmoe.profiling.clock import Step, Timing


@dataclass(frozen=True)
class Gemm:
    """A matrix product as a step."""

    step: Step
    flops: int


def gemm_steps(rows: int, dim: int, hidden: int, precision: str, device: torch.device) -> dict[str, Gemm]:
    """Two products, to take turns with the rest: the dense MLP's first, (rows, D)·(D, F), and a large square one."""
    side = 8192 if device.type == "cuda" else 768
    return {
        name: _gemm(*sizes, precision, device)
        for name, sizes in {"mlp": (rows, dim, hidden), "square": (side,) * 3}.items()
    }


def _gemm(rows: int, inner: int, columns: int, precision: str, device: torch.device) -> Gemm:
    dtype = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.float16}.get(precision, torch.bfloat16)
    left = torch.randn(rows, inner).to(device, dtype)
    right = torch.randn(inner, columns).to(device, dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    return Gemm(lambda: torch.mm(left, right, out=out), 2 * rows * inner * columns)


def gemm_rate(gemms: Mapping[str, Gemm], taken: Mapping[str, Timing]) -> float:
    """FLOP/s of the faster one."""
    return max(gemm.flops / (taken[f"gemm {name}"].median / 1000) for name, gemm in gemms.items())
