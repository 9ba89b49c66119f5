"""Reading pickled weights without running anything that they ask for."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from swinmoe.checkpoint.tutel import COUNT
from swinmoe.errors import CheckpointError

_HOMES = ("model", "state_dict", "module", "model_state_dict")

_HARMLESS: list[Any] = [(OrderedDict, "yacs.config.CfgNode")]
"""Microsoft's periodic files hold their configuration as a yacs node, a dict with attributes. It is read as one; the
class itself is never imported."""

_OF_WEIGHTS = re.compile(
    r"collections\.OrderedDict|yacs\.config\.CfgNode|torch\.(\w+Storage|Size|Tensor|device|dtype)"
    r"|torch\.(_utils|_tensor)\._rebuild_\w+|torch\.nn\.parameter\.Parameter|torch\.storage\.\w+"
)
"""What files of weights ask for anyway, and torch gives."""

_PICKLES = 4
"""At the head of an old file of torch's: a magic number, a version, the machine, and what was saved."""
_CHUNK_BYTES = 1 << 20


def read_pickle(file: Path | IO[bytes], label: str) -> dict[str, Tensor]:
    """The model's tensors of a `.pth`, `.pt` or `.bin` file.

    Files of today's kind, zips, are held against their checksums first; older ones have none.

    Raises:
        CheckpointError: not a readable file of weights, or one that asks for code to be run.
    """
    try:
        _check_sums(file, label)
        _rewind(file)
        with torch.serialization.safe_globals(_HARMLESS):
            tree = torch.load(file, map_location="cpu", weights_only=True)
        return find_tensors(tree, label)
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes raise whatever the unpickler stumbles over
        if isinstance(error, OSError) and error.errno is not None:
            raise CheckpointError(f"{label} cannot be read: {error.strerror}") from error
        asked = _asked(file)
        if asked:
            named = ", ".join(repr(name) for name in asked[:4])
            whole = any(name.startswith(("torch.nn.modules.", "timm.", "torchvision.")) for name in asked)
            inside = ".state_dict()" if whole else "['model']"  # a saved module, or a checkpoint with more in it
            raise CheckpointError(
                f"{label} asks for {named} to be loaded, which weights do not need, and is refused unread, since a "
                "pickle can run any code. If you trust where it comes from, strip it in a Python of your own: "
                f"torch.save({{'model': torch.load(FILE, weights_only=False){inside}}}, NEW_FILE)"
            ) from error
        # What torch says here ends in advice to load the file with its guard off, which is not passed on.
        raise CheckpointError(
            f"{label} is damaged, or no file of weights that torch wrote ({type(error).__name__}{_looks(file)}); get "
            "it again"
        ) from error


def find_tensors(tree: Any, label: str) -> dict[str, Tensor]:
    """A state dict, bare or under one of the usual names."""
    if isinstance(tree, Mapping):
        for home in _HOMES:
            if isinstance(tree.get(home), Mapping):
                tree = tree[home]
                break
        # Tutel's own tool writes a layer's number of experts as a plain number.
        tree = {n: torch.tensor(t) if isinstance(t, int) and COUNT in str(n) else t for n, t in tree.items()}
        others = [str(name) for name, tensor in tree.items() if not isinstance(tensor, Tensor)]
        if tree and len(others) < len(tree):
            if others:
                raise CheckpointError(
                    f"{label} has among its tensors what is none: {others[:6]}; give the model's state dict alone, or "
                    f"under one of {list(_HOMES)}"
                )
            return {str(name): tensor.detach() for name, tensor in tree.items()}
    raise CheckpointError(
        f"{label} holds no tensors by name, neither directly nor under one of {list(_HOMES)}; give a model's state dict"
    )


def _check_sums(file: Path | IO[bytes], label: str) -> None:
    """Hold a zip's members against their checksums, which `torch.load` does not look at."""
    with _opened(file) as opened:
        if not zipfile.is_zipfile(opened):
            return
        opened.seek(0)
        with zipfile.ZipFile(opened) as archive:
            members = archive.infolist()
            if not any(member.CRC for member in members):
                return  # written without (torch.serialization.set_crc32_options)
            for member in members:
                try:
                    with archive.open(member) as stream:
                        while stream.read(_CHUNK_BYTES):
                            pass
                except Exception as error:
                    raise CheckpointError(
                        f"{label} is damaged: its part {member.filename!r} is not what was written ({error}); get it "
                        "again"
                    ) from error


def _asked(file: Path | IO[bytes]) -> list[str]:
    """Names of what a pickle asks for and weights do not need; nothing is loaded to find out."""
    found: dict[str, None] = {}
    try:
        with _opened(file) as opened:
            if zipfile.is_zipfile(opened):
                opened.seek(0)
                with zipfile.ZipFile(opened) as archive:
                    for name in archive.namelist():
                        if name.endswith(".pkl"):
                            with archive.open(name) as stream:
                                found |= dict.fromkeys(_globals(stream))
            else:
                opened.seek(0)
                for _ in range(_PICKLES):
                    found |= dict.fromkeys(_globals(opened))
    except Exception:
        pass  # damaged from here on, or no pickle at all: what was found before counts
    # Text that is no pickle may by chance read like one that names things: not these.
    return [name for name in found if name.replace(".", "_").isidentifier() and not _OF_WEIGHTS.fullmatch(name)]


def _globals(stream: IO[bytes]) -> Iterator[str]:
    """`module.name` of every function and class that one pickle names; it ends where the bytes stop making sense."""
    texts: list[str] = []
    memo: dict[int, str] = {}
    last: str | None = None  # what was put on the stack, where that is text
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                yield str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join(texts[-2:])
            if opcode.name == "MEMOIZE":
                memo[len(memo)] = last or ""
            elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[int(str(argument))] = last or ""
            elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                last = memo.get(int(str(argument)), "")
                texts.append(last)
            elif isinstance(argument, str) and opcode.name not in ("GLOBAL", "INST"):
                last = argument
                texts.append(last)
            else:
                last = None
    except Exception:
        return


def _looks(file: Path | IO[bytes]) -> str:
    """What the file's first bytes are, where that is known."""
    try:
        with _opened(file) as opened:
            head = opened.read(64)
    except OSError:
        return ""
    if not head:
        return "; it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "; it is a pointer of Git LFS, which stands for the file: git lfs pull gets it"
    if head.lstrip()[:1] == b"<":
        return "; it is a web page"
    return ""


@contextmanager
def _opened(file: Path | IO[bytes]) -> Iterator[IO[bytes]]:
    """From the start; what came open stays open."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            yield opened
    else:
        file.seek(0)
        yield file


def _rewind(file: Path | IO[bytes]) -> None:
    if not isinstance(file, Path):
        file.seek(0)
