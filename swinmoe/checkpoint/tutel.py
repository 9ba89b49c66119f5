"""Tutel's layer in files: names, shapes, and how a job's ranks share the experts; with it Microsoft's Swin-MoE.

Shapes: E experts, W ranks, e = E/W experts of a rank, or one expert cut into s = W/E slices along F; D width, F hidden.
A rank's file has fc1_w (e, F/s, D), fc2_w (e, F/s, D), fc1_bias (e, F/s), fc2_bias (e, ceil(D/s)); in files of 2022 the
biases have an axis of 1 in the middle. Rank r has slice r mod s of expert r div s. fc2_w is applied from the right, so
that it is the transpose of a linear layer's weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from swinmoe.checkpoint.microsoft import DERIVED, SAME
from swinmoe.checkpoint.rules import Layout, Rule, rename
from swinmoe.errors import CheckpointError

State = Mapping[str, Tensor]

EXPERT = re.compile(r"(?P<layer>(?:.*\.)?)experts\.batched_(?P<part>fc[12]_(?:w|bias))")
COUNT = "_num_global_experts"
EQUAL = "ranks-equal"
"""What allows the files of two ranks to hold the same experts."""


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _rules(foreign: str, ours: str) -> tuple[Rule, ...]:
    """Of one layer whose names begin with `foreign` there and with `ours` here."""
    return (
        Rule(f"{foreign}experts.batched_fc2_w", f"{ours}experts.fc2_weight", _transposed, _transposed),
        *rename(
            (foreign + theirs, ours + name)
            for theirs, name in (
                ("experts.batched_fc1_w", "experts.fc1_weight"),
                ("experts.batched_fc1_bias", "experts.fc1_bias"),
                ("experts.batched_fc2_bias", "experts.fc2_bias"),
                ("gates.0.wg.weight", "router.weight"),
                ("gates.0.temperature", "router.temperature"),
                ("gates.0.cosine_projector.{rest}", "router.projector.{rest}"),
                ("gates.0.sim_matrix", "router.sim_matrix"),
            )
        ),
    )


_COUNTED = rf"(.*\.)?{COUNT}"
TUTEL = Layout("tutel", _rules("{prefix}", "{prefix}"), (_COUNTED,))
"""One layer or several by themselves, experts whole."""
SWIN_MOE = Layout(
    "swin-moe",
    (*_rules("{prefix}mlp._moe_layer.", "{prefix}mlp."), *SAME),
    (*DERIVED, _COUNTED),
)
"""Microsoft's Swin-MoE, experts whole."""


def join_ranks(
    ranks: Sequence[State], master: State | None = None, allow: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of a single process from the files of all ranks.

    Args:
        ranks: in the order of ranks; all names, or those of experts only where there is a `master`.
        master: what ranks share, of Microsoft's final files. It also has rank 0's part of frozen biases.
        allow: patterns, as `ranks:norm.*`, of shared names that may differ between ranks; rank 0's are taken then. And
            `ranks-equal`, if two ranks may have equal experts.

    Returns:
        Names -> tensors with experts whole, and what was changed in taking them: name -> how.

    Raises:
        CheckpointError: ranks are missing, have not the same names, have equal experts, or differ in what they share.
    """
    experts = sorted(name for name in ranks[0] if EXPERT.fullmatch(name))
    _check_names(ranks)
    _check_own_experts(ranks, experts, allow)
    state = dict(master or {})
    notes: dict[str, str] = {}
    for name, tensor in ranks[0].items():
        if name not in experts:
            note = _compare(name, [rank[name] for rank in ranks], allow)
            if note:
                notes[name] = note
            state[name] = tensor
    for name in experts:
        state[name] = torch.cat([rank[name] for rank in ranks])
    for name in [name for name in state if EXPERT.fullmatch(name)]:
        layer = _layer_of(name)
        whole, note = _whole(name, state, _num_experts(state, layer), len(ranks), in_master=name not in experts)
        state[name] = whole
        if note:
            notes[name] = note
    return state, notes


def split_ranks(state: State, num_ranks: int) -> list[dict[str, Tensor]]:
    """The files of `num_ranks` processes in Tutel's present shapes from a state with experts whole.

    Raises:
        CheckpointError: neither of `num_ranks` and the number of experts divides the other, or an expert cannot be cut.
    """
    files: list[dict[str, Tensor]] = [{} for _ in range(num_ranks)]
    for name, tensor in state.items():
        found = EXPERT.fullmatch(name)
        parts = _cut(name, tensor, num_ranks) if found else [tensor] * num_ranks
        for file, part in zip(files, parts, strict=True):
            file[name] = part
        if found and found["part"] == "fc1_w":
            for file in files:
                file[f"{found['layer']}{COUNT}"] = torch.tensor(tensor.shape[0])
    return files


def split_master(files: Sequence[State]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Microsoft's final form of the same: learned expert tensors by rank, everything else of rank 0 in a master."""
    learned = [
        name
        for name in files[0]
        if (found := EXPERT.fullmatch(name))
        and (found["part"] != "fc2_bias" or any(file[name].any() for file in files))
    ]
    ranks = [{name: file[name] for name in learned} for file in files]
    return ranks, {name: tensor for name, tensor in files[0].items() if name not in learned}


def _cut(name: str, tensor: Tensor, num_ranks: int) -> list[Tensor]:
    experts, second = tensor.shape[:2]
    if experts % num_ranks == 0:
        return [part.clone() for part in tensor.chunk(num_ranks)]
    if num_ranks % experts:
        raise CheckpointError(
            f"{name!r} has {experts} experts, which {num_ranks} ranks cannot share; use a number of ranks that divides "
            f"{experts}, or is a multiple of it"
        )
    slices = num_ranks // experts
    if second % slices:
        if not name.endswith("fc2_bias"):
            raise CheckpointError(
                f"{name!r}: {slices} slices of an expert's {second} hidden units are uneven; use fewer ranks"
            )
        tensor = torch.nn.functional.pad(tensor, (0, -second % slices))  # Tutel rounds up and cuts off when used
    return [part.clone() for part in tensor.reshape(num_ranks, 1, -1, *tensor.shape[2:])]


def _num_experts(state: State, layer: str) -> int:
    gates = [(f"{layer}gates.0.wg.weight", 0), (f"{layer}gates.0.sim_matrix", 1)]
    counts = [int(state[name].shape[axis]) for name, axis in gates if name in state]
    if f"{layer}{COUNT}" in state:
        counts.append(int(state[f"{layer}{COUNT}"]))
    if not counts:
        raise CheckpointError(
            f"the files have experts of {layer or 'a layer'!r} and no gate to count them by; add the file that has the "
            "gate (of Microsoft's final files, the one that ends in .master)"
        )
    if len(set(counts)) > 1:
        raise CheckpointError(f"{layer!r}: its gate counts {counts[0]} experts and {COUNT} says {counts[-1]}; damaged?")
    return counts[0]


def _whole(name: str, state: State, experts: int, ranks: int, *, in_master: bool) -> tuple[Tensor, str]:
    """All experts of one tensor, from all ranks' parts in a row: (E, F, D), or (E, F), (E, D) for biases."""
    parts = state[name]
    is_bias = name.endswith("bias")
    if is_bias:
        parts = parts.flatten(1)
    held = parts.shape[0] * (ranks if in_master else 1)  # rows that all ranks have together
    slices, rest = divmod(held, experts)
    if rest or not slices:
        raise CheckpointError(
            f"{name!r}: {ranks} rank file(s) hold {held} expert parts for {experts} experts; give the files of all "
            "ranks"
        )
    _check_slices(name, state, slices)
    if in_master:
        return _frozen_bias(name, state, parts, experts)
    if slices > 1:
        parts = parts.unflatten(0, (experts, slices)).flatten(1, 2)
    if name.endswith("fc2_bias"):
        parts = parts[:, : _width(name, state)]
    return parts, ""


def _layer_of(name: str) -> str:
    """What stands before `experts.` in the name of an expert tensor."""
    match = EXPERT.fullmatch(name)
    assert match is not None, name
    return match["layer"]


def _check_slices(name: str, state: State, slices: int) -> None:
    """The second bias is cut along with the experts, and tells into how many slices."""
    layer = _layer_of(name)
    bias = state.get(f"{layer}experts.batched_fc2_bias")
    if bias is None:
        return
    width = _width(name, state)
    if bias.shape[-1] not in (width, -(-width // slices)):
        raise CheckpointError(
            f"{name!r}: the files at hold have {slices} slice(s) of each expert, but their second bias of "
            f"{bias.shape[-1]} for a width of {width} tells of {round(width / bias.shape[-1])}; give the files of all "
            "ranks"
        )


def _width(name: str, state: State) -> int:
    layer = _layer_of(name)
    return int(state[f"{layer}experts.batched_fc2_w"].shape[-1])


def _frozen_bias(name: str, state: State, parts: Tensor, experts: int) -> tuple[Tensor, str]:
    """Of a bias in the master there is rank 0's part only, which is enough where it is frozen at zero."""
    shape = (experts, _width(name, state))
    if tuple(parts.shape) == shape:
        return parts, ""
    if parts.any() or not name.endswith("fc2_bias"):
        raise CheckpointError(
            f"{name!r} is in the shared file with rank 0's part {tuple(parts.shape)} of {shape}, and not zero: the "
            "rest of it was never saved; use the periodic files (ckpt_epoch_*.pth.rank*), which have all of it"
        )
    return parts.new_zeros(shape), f"frozen at zero: rank 0's part {tuple(parts.shape)} stands for all {shape}"


def _check_names(ranks: Sequence[State]) -> None:
    for number, rank in enumerate(ranks):
        odd = set(rank) ^ set(ranks[0])
        if odd:
            raise CheckpointError(
                f"rank {number}'s file and rank 0's do not name the same tensors ({sorted(odd)[:4]}); they are not of "
                "one checkpoint"
            )


def _check_own_experts(ranks: Sequence[State], experts: Sequence[str], allow: Sequence[str]) -> None:
    """No two files hold the same experts, as a file copied over another's name would: nothing else tells."""
    if EQUAL in allow:
        return
    seen: dict[tuple[float, ...], list[int]] = {}  # by a few values each, so that few are compared in full
    for number, rank in enumerate(ranks):
        key = tuple(float(value) for name in experts for value in rank[name].flatten()[:4])
        for other in seen.setdefault(key, []):
            if any(rank[name].any() for name in experts) and all(
                torch.equal(rank[name], ranks[other][name]) for name in experts
            ):
                raise CheckpointError(
                    f"the files of ranks {other} and {number} hold the same experts to the bit: one was copied over "
                    f"the other? Get it again; if all experts started as copies, allow it: {EQUAL!r}"
                )
        seen[key].append(number)


def _compare(name: str, tensors: Sequence[Tensor], allow: Sequence[str]) -> str:
    """Microsoft's ranks clip gradients each by itself, so that what they share drifts apart: it must be allowed."""
    if all(torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
        return ""
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        raise CheckpointError(f"{name!r} has another shape on some ranks; the files are not of one checkpoint")
    gap = max(float((tensor.double() - tensors[0].double()).abs().max()) for tensor in tensors)
    if not any(fnmatchcase(f"ranks:{name}", pattern) for pattern in allow if pattern.startswith("ranks:")):
        raise CheckpointError(
            f"{name!r} should be the same on all ranks and differs by up to {gap:.1e} (ranks that clip their gradients "
            "one by one drift apart); to take rank 0's, allow it by name: 'ranks:*', or a narrower pattern"
        )
    return f"differs between ranks by up to {gap:.1e}; rank 0's taken"
