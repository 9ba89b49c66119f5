"""Global random state and deterministic kernels."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from swinmoe.randomness import derive_seed


def set_determinism(seed: int, rank: int = 0) -> None:
    """Seed the global generators of Python, NumPy and torch, and choose deterministic kernels.

    Draws that must not depend on the process (weights, augmentation, gate noise) have generators of their own
    (`swinmoe.randomness`); the global ones serve the rest, e.g. dropout, which should differ between ranks.

    Operations without a deterministic kernel warn instead of failing.
    """
    # cuBLAS reads this when it first starts; it is the documented condition for deterministic products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    random.seed(derive_seed("python", seed, rank))
    np.random.seed(derive_seed("numpy", seed, rank) % 2**32)
    torch.manual_seed(derive_seed("torch", seed, rank))
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling every uninitialised buffer with NaN is a debugging aid that costs a pass over memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
