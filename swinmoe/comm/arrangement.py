"""Where rows of an exchange stand on one side of it, where that is not in rank order.

Rows for the experts of a rank arrive source by source, and experts want theirs together. Who copies rows out of another
process's memory anyway can put every piece where it belongs; elsewhere rows are put in order by an index.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from swinmoe.comm.regroup import Regrouping, regroup


@dataclass(frozen=True)
class Arrangement:
    """Pieces of rows, by the rank that they come from or go to, and where each of them stands."""

    pieces: tuple[tuple[tuple[int, int], ...], ...]
    """By rank and in the order in which they travel: first row and number of rows."""
    _lengths: Tensor
    _order: Tensor
    _changes: dict[torch.device, Regrouping | None] = field(default_factory=dict, compare=False)

    def change(self, device: torch.device) -> Regrouping | None:
        """From rank order to how rows stand."""
        if device not in self._changes:
            self._changes[device] = regroup(self._lengths, self._order, device)
        return self._changes[device]


def by_expert(segments: Tensor, ranks: int) -> Arrangement | None:
    """Rows that travel by (source, expert) stand by (expert, source); None where that is the same.

    Args:
        segments: (S, e) int64 on the host, rows of each source and expert.
        ranks: of the group they travel in; each has S/ranks of the sources.
    """
    sources, experts = segments.shape
    if sources == 1 or experts == 1:
        return None
    order = torch.arange(sources * experts).view(sources, experts).t().reshape(-1)
    lengths = segments.reshape(-1)
    standing = lengths[order]
    starts = torch.empty_like(lengths)
    starts[order] = standing.cumsum(0) - standing
    pieces = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    each = len(pieces) // ranks
    by_rank = (pieces[rank * each : (rank + 1) * each] for rank in range(ranks))
    return Arrangement(tuple(tuple(piece for piece in some if piece[1]) for some in by_rank), lengths, order)
