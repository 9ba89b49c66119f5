"""Random draws for augmentation that depend on what they are for, never on when or where they are made."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def uniforms(seed: int, indices: npt.ArrayLike, count: int) -> npt.NDArray[np.float64]:
    """`count` uniform numbers in [0, 1) for each index, without drawing those of other indices.

    Row i holds outputs `i*count ... i*count + count - 1` of the SplitMix64 stream that starts at `seed` (Steele, Lea
    and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). That generator is a mixing function of a
    counter, so any part of the stream can be computed directly, for a whole batch at once.

    Args:
        seed: start of the stream; its low 64 bits count.
        indices: (b,) non-negative integers.
        count: draws for each index.

    Returns:
        (b, count) float64, multiples of 2^-53.
    """
    rows = np.asarray(indices).astype(np.uint64).reshape(-1, 1)
    counter = rows * np.uint64(count) + np.arange(1, count + 1, dtype=np.uint64)
    start = np.full(1, seed & _MASK, dtype=np.uint64)  # an array: numpy warns when scalars wrap, and wrapping is meant
    z: npt.NDArray[np.uint64] = np.multiply(counter, _GAMMA, dtype=np.uint64) + start
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    high = (z >> np.uint64(11)).astype(np.float64)
    return high * 2.0**-53


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Inside, Python's, numpy's and torch's global CPU generators start from `seed`; afterwards they are as before.

    For library code that draws from global state (timm's RandAugment, random erasing and mixup, torchvision's crops).
    `torch.manual_seed` would reach CUDA's generators as well, so torch's CPU generator is addressed alone.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF])
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
