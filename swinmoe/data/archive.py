"""Reading members of large archives at random, from any number of loader processes.

A archives
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from swinmoe.errors import DataError

_OPEN_AT_ONCE = 64
"""Per process. A data set may have thousands of shards, and a process commonly may open 1024 files in all."""


class ArchiveFiles:
    """A archives, each opened in a process when that process first reads from it.

    Reads name their position (pread), so forked workers that inherit a descriptor share no file offset; a pickled copy
    starts with none open. For one thread of each process.

    Args:
        paths: of the archives; positions in it are their numbers.
        limit: so many are open at most, those used last.
    """

    def __init__(self, paths: Sequence[str], *, limit: int = _OPEN_AT_ONCE) -> None:
        self.paths = tuple(paths)
        self._limit = limit
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, archive: int, offset: int, size: int) -> bytes:
        """`size` bytes of an archive from `offset`.

        Raises:
            DataError: it cannot be opened or read, or ends before.
        """
        try:
            parts, left = [], size
            while left and (part := os.pread(self._descriptor(archive), left, offset + size - left)):
                parts.append(part)  # one read returns 2 GiB at most
                left -= len(part)
        except OSError as error:
            raise DataError(f"{self.paths[archive]} cannot be read ({error.strerror})") from error
        if left:
            raise DataError(
                f"{self.paths[archive]} ends {left} bytes before byte {offset + size}, where a member should end; it "
                "was cut off or changed after the run began: fetch it again"
            )
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _descriptor(self, archive: int) -> int:
        if archive in self._descriptors:
            self._descriptors.move_to_end(archive)
        else:
            if len(self._descriptors) >= self._limit:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[archive] = os.open(self.paths[archive], os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[archive]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            os.close(descriptor)


class Named(Protocol):
    """Images whose class ids are numbers in a file, where anything may stand."""

    @property
    def targets(self) -> Tensor:
        """(N,) int64."""

    def name(self, index: int) -> str:
        """The file, and the member of it, that holds image `index`."""


def class_id(value: object) -> int:
    """A label as it stands in a file, a whole number or its text; `ValueError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is not a whole number")
    number = int(value)
    if abs(number) >= 1 << 31:
        raise ValueError(f"{number} is too large")
    return number


def check_labels(train: Named, evaluation: Named | None, num_classes: int | None) -> int:
    """The number of classes: as given, or the highest training label plus one.

    Raises:
        DataError: no training images, or a label outside 0 ... classes - 1, with the name of the image.
    """
    if not len(train.targets):
        raise DataError("the data set lists no training image")
    classes = int(train.targets.max()) + 1 if num_classes is None else num_classes
    given = "the highest training label plus one" if num_classes is None else "data.num_classes"
    for source in (train, evaluation):
        if source is None:
            continue
        wrong = ((source.targets < 0) | (source.targets >= classes)).nonzero()
        if len(wrong):
            first = int(wrong[0])
            raise DataError(
                f"{source.name(first)} has label {int(source.targets[first])}, and {len(wrong)} image(s) in all have "
                f"labels outside 0 ... {classes - 1} ({given}={classes}); correct the labels or data.num_classes"
            )
    return classes
