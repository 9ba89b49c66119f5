"""The order of an epoch, drawn by a generator that depends on seed and epoch alone.

N images, A archives
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def windowed(archive: npt.NDArray[np.int32], window: int, draws: torch.Generator) -> Tensor:
    """(N,) int64: a permutation that visits archives one after another, in random order, and mixes nearby images only.

    Args:
        archive: (N,) which archive each image is in.
        window: so many consecutive images are shuffled among themselves; several archives mix where it spans them.
        draws: where the randomness comes from.
    """
    visit = torch.randperm(int(archive.max(initial=-1)) + 1, generator=draws)
    order = torch.argsort(visit[torch.from_numpy(archive).long()], stable=True)
    for part in order.split(window):
        part.copy_(part[torch.randperm(len(part), generator=draws)])
    return order
