"""Seeds derived from names, so that a random draw depends on what it is for and on nothing else.

Weights, noise, augmentation and sampling all take their seed from here. A draw keyed by `(seed, layer, expert)` is the
same on one process and on a thousand, and the same for two models that share a parameter's name.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on `parts` only (not on PYTHONHASHSEED, rank, device or call order)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh `torch.Generator` seeded by `derive_seed(*parts)`."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))
