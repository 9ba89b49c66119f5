"""Reading tensors of which each rank holds a part: one rank reads a whole one, checks it, and deals the parts out.

A hash is of a whole tensor. A rank that read its own part of the file could not check it, and one that read the rest to
check it would read what is not its own. Dealt out, every byte is read once and checked; a rank reads as much as it
holds, give or take one tensor, and in one piece.

Shapes: a whole is cut along one axis into a part for each rank of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swinmoe.checkpoint.reader import Tensors
from swinmoe.comm import Group, all_to_all_rows
from swinmoe.errors import CheckpointError


class Dealer:
    """The ranks of `group`, `rank` of them this one. All construct it and call it alike."""

    def __init__(self, group: Group, rank: int, ranks: int) -> None:
        self.group, self.rank = group, rank
        self.problem: CheckpointError | None = None
        """What this rank found wrong first. It still deals, for the others wait; to be raised when all is dealt."""
        self._read = [0] * ranks

    def fill(self, out: Tensor, source: Tensors, name: str, axis: int, lengths: Sequence[int]) -> None:
        """Fill this rank's `out` with its part of tensor `name`. A collective call.

        Args:
            out: of any floating type and device, where the group can send.
            source: holds the whole.
            name: of it.
            axis: along which it is cut.
            lengths: of all ranks' parts.

        Raises:
            CollectiveError: a rank did not take part.
        """
        entry = source.entry(name)
        reader = min(range(len(self._read)), key=self._read.__getitem__)
        self._read[reader] += entry.nbytes
        sent, sends = torch.empty(0, dtype=torch.uint8), [0] * len(lengths)
        if reader == self.rank:
            parts = self._whole(source, name).split(list(lengths), axis)
            sends = [part.nbytes for part in parts]
            # As bytes: not every backend knows every type.
            sent = torch.cat([part.reshape(-1) for part in parts]).view(torch.uint8)
        receives = [0] * len(lengths)
        receives[reader] = out.numel() * entry.dtype.itemsize
        dealt = all_to_all_rows(sent.to(out.device), sends, receives, self.group, f"dealing out {name}")
        out.detach().copy_(dealt.view(entry.dtype).view(out.shape))

    def _whole(self, source: Tensors, name: str) -> Tensor:
        try:
            return source[name]
        except CheckpointError as error:
            self.problem = self.problem or error
            entry = source.entry(name)
            return torch.zeros(entry.shape, dtype=entry.dtype)
