"""Where the samples of a tar shard are: found once by walking its headers, kept in a small JSON file, checked on use.

A shard is as WebDataset writes it: uncompressed, members of a sample side by side, `KEY.jpg` with `KEY.cls` (a number
as text) or `KEY.json`; KEY ends at the first dot of the file name. Members of other kinds are skipped.

n samples of a shard
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swinmoe.data.archive import class_id
from swinmoe.errors import DataError

_IMAGES = ("jpg", "jpeg", "png", "webp")
_FORMAT = 1
_BLOCK = 512


@dataclass(frozen=True)
class TarIndex:
    """The images of a shard, in its order."""

    members: list[str]
    """n file names of images."""
    offsets: list[int]
    """n positions of their first bytes."""
    sizes: list[int]
    """n lengths in bytes."""
    labels: list[int]
    """n class ids."""


def tar_index(shard: Path, *, index_dir: Path | None, label_key: str) -> TarIndex:
    """The index of a shard: the one kept, if it was made of this very file, or a new one, which is then kept.

    Args:
        shard: the archive.
        index_dir: where indices are kept; None = beside the shard, as `NAME.index.json`.
        label_key: where a `.json` member has the class id.

    Raises:
        DataError: an unreadable, compressed or damaged archive; a sample without image or label, with two, or met
            twice; an index that cannot be written. The message names the archive and the member.
    """
    try:
        stat = shard.stat()
    except OSError as error:
        raise DataError(f"tar shard {shard} cannot be read ({error.strerror})") from error
    # Seconds would not tell a shard that was rewritten at once.
    stamp = {"format": _FORMAT, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "label_key": label_key}
    kept = _place(shard, index_dir)
    found = _load(kept, stamp)
    if found is None:
        found = _scan(shard, label_key)
        _keep(kept, {**stamp, **asdict(found)})
    return found


def _place(shard: Path, index_dir: Path | None) -> Path:
    if index_dir is None:
        return shard.with_suffix(".index.json")
    # Shards of several folders share this one: train/0000.tar is not val/0000.tar.
    folder = hashlib.sha256(os.fsencode(shard.parent.resolve())).hexdigest()[:12]
    return index_dir / f"{shard.stem}-{folder}.index.json"


def _load(path: Path, stamp: dict[str, Any]) -> TarIndex | None:
    """The index at `path`; None if there is none, or one of another file, or a damaged one: it is then made again."""
    try:
        tree = json.loads(path.read_bytes())
        if any(tree.pop(key) != value for key, value in stamp.items()):
            return None
        index = TarIndex(**tree)
        columns = (index.members, index.offsets, index.sizes, index.labels)
        return index if len({len(column) for column in columns}) == 1 else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _keep(path: Path, tree: dict[str, Any]) -> None:
    """Written aside and renamed, so that of ranks that make it at once, each leaves a whole one."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(tree, separators=(",", ":")), encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise DataError(
            f"index {path} cannot be written ({error.strerror}); set data.index_dir to a folder that can be written, "
            "which all ranks share"
        ) from error


def _scan(shard: Path, label_key: str) -> TarIndex:
    index = TarIndex([], [], [], [])
    ended: set[str] = set()
    sample = _Sample("")
    end = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                end = member.offset_data
                if not member.isreg():
                    continue
                end += -(-member.size // _BLOCK) * _BLOCK
                key, extension = _parts(member.name)
                if not key or extension not in (*_IMAGES, "cls", "json"):
                    continue
                if key != sample.key:
                    sample.add_to(index, shard)
                    ended.add(sample.key)
                    if key in ended:
                        raise DataError(f"{shard}: {member.name} comes back to the key {key!r}; pack it again")
                    sample = _Sample(key)
                if extension in _IMAGES:
                    sample.set_image(member, shard)
                else:
                    sample.set_label(member, extension, tar, shard, label_key)
            sample.add_to(index, shard)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"tar shard {shard} cannot be read to its end ({error}); it is compressed, cut off or damaged: fetch it "
            "again, or unpack the compression, for only plain tar files can be read at random"
        ) from error
    _check_end(shard, end)
    return index


class _Sample:
    """The members of one key, while they are met."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.image: tarfile.TarInfo | None = None
        self.labels: dict[str, int] = {}

    def set_image(self, member: tarfile.TarInfo, shard: Path) -> None:
        if self.image is not None:
            raise DataError(f"{shard}: {member.name} is a second image of the key {self.key!r}; keep one of them")
        self.image = member

    def set_label(
        self, member: tarfile.TarInfo, extension: str, tar: tarfile.TarFile, shard: Path, label_key: str
    ) -> None:
        if extension in self.labels:
            raise DataError(f"{shard}: {member.name} is there twice; keep one of them")
        file = tar.extractfile(member)
        raw = file.read() if file is not None else b""
        try:
            if extension == "cls":
                self.labels[extension] = class_id(raw.decode("ascii"))
                return
            tree = json.loads(raw)
            if isinstance(tree, dict) and label_key in tree:
                self.labels[extension] = class_id(tree[label_key])
        except ValueError as error:
            raise DataError(f"{shard}: {member.name} holds no class id ({error})") from error

    def add_to(self, index: TarIndex, shard: Path) -> None:
        if not self.key:
            return
        if self.image is None:
            raise DataError(f"{shard}: the key {self.key!r} has a label but no image (.{', .'.join(_IMAGES)})")
        if not self.labels:
            raise DataError(
                f"{shard}: {self.image.name} has no class id: add {self.key}.cls, or {self.key}.json with the key that "
                "data.label_key names"
            )
        index.members.append(self.image.name)
        index.offsets.append(self.image.offset_data)
        index.sizes.append(self.image.size)
        index.labels.append(self.labels.get("cls", self.labels.get("json", 0)))


def _parts(name: str) -> tuple[str, str]:
    """Key and extension: `a/b.c.jpg` is the key `a/b` with the extension `c.jpg`."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}{slash}{stem}" if stem else ""), extension.lower()


def _check_end(shard: Path, end: int) -> None:
    """A tar file ends with two blocks of zeros. Python's reader also stops, silently, at a damaged header or where the
    file was cut between two members, which would lose the samples behind it."""
    with shard.open("rb") as file:
        file.seek(end)
        rest, blocks = 0, 0
        while chunk := file.read(1 << 16):
            if chunk.count(0) != len(chunk):
                raise DataError(
                    f"tar shard {shard} is damaged: after its last readable member, at byte {end + rest}, comes "
                    "neither a member nor the end; fetch it again"
                )
            rest += len(chunk)
            blocks = rest // _BLOCK
    if blocks < 2:
        raise DataError(f"tar shard {shard} has no end mark at byte {end}: it was cut off; fetch it again")
