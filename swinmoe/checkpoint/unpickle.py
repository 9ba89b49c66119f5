"""Reading pickled weights without running anything that they ask for."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
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


def read_pickle(file: Path | IO[bytes], label: str) -> dict[str, Tensor]:
    """The model's tensors of a `.pth`, `.pt` or `.bin` file.

    Raises:
        CheckpointError: not a readable file of weights, or one that asks for code to be run.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            tree = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked is None:
            raise CheckpointError(f"{label} is damaged, or no file of weights: {str(error).splitlines()[0]}") from error
        raise CheckpointError(
            f"{label} asks for {asked[1]!r} to be loaded, which weights do not need, and is refused unread, since a "
            "pickle can run any code. If you trust where it comes from, strip it in a Python of your own: "
            "torch.save({'model': torch.load(FILE, weights_only=False)['model']}, NEW_FILE)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise CheckpointError(f"{label} cannot be read: {error.strerror}") from error
        raise CheckpointError(f"{label} is damaged, or no file of weights: {str(error).splitlines()[0]}") from error
    return find_tensors(tree, label)


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
