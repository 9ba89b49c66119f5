"""The machine's matrix-product rate, against which utilisation (MFU) is stated."""

from __future__ import annotations

import time

import torch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def measure_peak_flops(device: torch.device, precision: str, size: int | None = None) -> float:
    """FLOP/s of the best of a few square matrix products on `device` in the run's precision.

    A measured peak, not a data sheet's: utilisation is against what this machine does here.
    """
    n = size or (8192 if device.type == "cuda" else 768)
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(device, _DTYPES[precision])
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * n**3 / best
