"""Names of tensors in files: one key per expert, counted globally, whatever the model stacks in memory.

Shapes: E experts, stacked as (E, ...) in a model: `X.experts.fc1_weight` (E, F, D), `fc1_bias` (E, F), `fc2_weight`
(E, D, F), `fc2_bias` (E, D). In files: `X.experts.0.fc1.weight` (F, D) to `X.experts.{E-1}.fc2.bias` (D,), each as in
`nn.Linear`. A shared expert, stacked alone, is `X.shared.0....`. All other names are the model's own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from swinmoe.errors import CheckpointError

_STACKED = re.compile(r"(?P<layer>(?:.*\.)?(?:experts|shared))\.(?P<part>fc[12])_(?P<kind>weight|bias)")
_SINGLE = re.compile(r"(?P<layer>(?:.*\.)?(?:experts|shared))\.(?P<id>\d+)\.(?P<part>fc[12])\.(?P<kind>weight|bias)")


def expert_key(stacked: str, expert: int) -> str | None:
    """Name in files of one expert's tensor: `X.experts.fc1_weight`, 3 -> `X.experts.3.fc1.weight`; None for others."""
    match = _STACKED.fullmatch(stacked)
    return None if match is None else f"{match['layer']}.{expert}.{match['part']}.{match['kind']}"


def stacked_key(single: str) -> tuple[str, int] | None:
    """The other way: `X.experts.3.fc1.weight` -> (`X.experts.fc1_weight`, 3); None for names of no expert."""
    match = _SINGLE.fullmatch(single)
    return None if match is None else (f"{match['layer']}.{match['part']}_{match['kind']}", int(match["id"]))


def to_files(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors (whole, not a rank's part) under their names in files; experts as views of their stacks."""
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if expert_key(name, 0) is None:
            named[name] = tensor
        else:
            named |= {str(expert_key(name, expert)): part for expert, part in enumerate(tensor.unbind())}
    return named


def to_model(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names in files under the model's names, experts stacked.

    Raises:
        CheckpointError: an expert between 0 and the highest is missing, or has another shape than its neighbours.
    """
    state: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in named.items():
        place = stacked_key(name)
        if place is None:
            state[name] = tensor
        else:
            stacks[place[0]][place[1]] = tensor
    for name, experts in stacks.items():
        _check_stack(name, experts)
        state[name] = torch.stack([experts[expert] for expert in range(len(experts))])
    return state


def num_experts(names: Iterable[str]) -> dict[str, int]:
    """Experts of each layer, `X.experts` -> E, by the highest number among `names`."""
    found: dict[str, int] = {}
    for name in names:
        match = _SINGLE.fullmatch(name)
        if match is not None and match["layer"].endswith("experts"):
            found[match["layer"]] = max(found.get(match["layer"], 0), int(match["id"]) + 1)
    return found


def _check_stack(name: str, experts: Mapping[int, Tensor]) -> None:
    missing = sorted(set(range(max(experts) + 1)) - set(experts))
    if missing:
        raise CheckpointError(
            f"{name!r} has experts up to {max(experts)} but lacks {missing}; the file is incomplete: convert it again, "
            "or give every part of it"
        )
    shapes = {tuple(tensor.shape) for tensor in experts.values()}
    if len(shapes) > 1:
        raise CheckpointError(f"{name!r}: experts have different shapes {sorted(shapes)}; they cannot form one layer")
