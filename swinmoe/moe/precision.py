"""What autocast asks of code that does its own casting."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants matrix products of `x` to run in, or None where it is off.

    As in torch itself, float64 is left alone: who computes in double precision means it.
    """
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def rounds_products(x: Tensor) -> bool:
    """True where float32 matrix products of `x` are computed in TensorFloat-32 or less (`train.tf32`)."""
    return x.is_cuda and torch.get_float32_matmul_precision() != "highest"


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which products run in the dtype of their operands."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)
