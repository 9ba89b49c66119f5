"""Between what ranks hold in memory and what files name: which rank writes which tensor, and reads which part of one.

Everything here follows from names, shapes and the mesh alone, so that all ranks come to the same plan without a word.

Shapes: E experts counted globally; a rank holds e of them, stacked (e, ...), or one slice of one, (1, ...). In files
each expert has tensors of its own (`swinmoe.checkpoint.naming`), whole. Two more ways to share are joined there too:
FSDP2 cuts what is equal on all ranks by rows (`swinmoe.parallel.cut`), experts stacked so by number; and with ZeRO some
ranks hold a parameter's moments, and the others a tensor without storage in their place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from swinmoe.checkpoint.deal import Dealer
from swinmoe.checkpoint.naming import expert_key
from swinmoe.checkpoint.reader import Tensors
from swinmoe.checkpoint.tensor_file import Shape
from swinmoe.comm import all_gather_rows
from swinmoe.errors import CheckpointError
from swinmoe.moe import MoEMlp
from swinmoe.parallel import Cut, Mesh, cut_of, join_rows, local_part
from swinmoe.parallel.expert_parameter import ExpertParameter, join_slices

SHARD_BYTES = 4 * 2**30
"""A file is closed before it grows beyond this, unless one tensor is larger."""


@dataclass(frozen=True)
class Stack:
    """How the experts of one parameter lie over the ranks."""

    num_experts: int
    """E."""
    spread: bool = False
    """False: every rank has all of them."""
    slices: int = 1
    """Ranks over which each expert is cut."""
    axis: int = 0
    """Axis of one expert's tensor that is cut."""


@dataclass(frozen=True)
class Held:
    """A tensor as this rank holds it."""

    tensor: Tensor
    stack: Stack | None = None
    """None: no experts, and equal on all ranks unless it is cut."""
    holders: frozenset[int] | None = None
    """The ranks that have values, each those of its part; None = all."""
    cut: Cut | None = None
    """Which rows these are of a tensor that is cut over all ranks, experts where it is a stack; None = it is not."""

    @property
    def rows(self) -> int:
        """Rows of the whole along the leading axis, as far as `cut` goes."""
        return self.tensor.shape[0] if self.cut is None else self.cut.rows


def stacks(model: nn.Module) -> dict[str, Stack]:
    """Every parameter of `model` that stacks experts, by name."""
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, MoEMlp):
            continue
        prefix = f"{name}." if name else ""
        for key, parameter in layer.experts.named_parameters(f"{prefix}experts"):
            if isinstance(parameter, ExpertParameter):
                found[key] = Stack(layer.num_experts, True, parameter.slices, parameter.axis - 1)
            else:
                found[key] = Stack(layer.num_experts)
        if layer.shared is not None:
            found |= {key: Stack(1) for key, _ in layer.shared.named_parameters(f"{prefix}shared")}
    return found


def hold(
    tensors: Mapping[str, Tensor], found: Mapping[str, Stack], holders: Mapping[str, frozenset[int]] | None = None
) -> dict[str, Held]:
    """`tensors` named as in a state dict, or `NAME#KEY` for an optimiser's value of parameter NAME, with their spread.

    Scalars of an optimiser, such as AdamW's step count, belong to a stack as a whole. `holders`: by parameter, the
    ranks that hold what is named after it, where not all do.
    """
    held = {}
    for name, tensor in tensors.items():
        parameter = name.partition("#")[0]
        stack = found.get(parameter) if tensor.dim() else None
        held[name] = Held(local_part(tensor), stack, (holders or {}).get(parameter), cut_of(tensor))
    return held


def name_in_files(name: str, expert: int) -> str:
    """Name of one expert's tensor: `X.experts.fc1_weight#exp_avg`, 3 -> `X.experts.3.fc1.weight#exp_avg`."""
    stacked, hash_sign, key = name.partition("#")
    single = expert_key(stacked, expert)
    if single is None:  # an expert type of the user's own, whose parameters have other names
        layer, _, rest = stacked.rpartition("experts.")
        single = f"{layer}experts.{expert}.{rest}"
    return f"{single}{hash_sign}{key}"


@dataclass(frozen=True)
class Item:
    """One tensor of a file, and who can write it."""

    name: str
    """In the file."""
    held: str
    """In memory."""
    shape: Shape
    """Whole."""
    expert: int | None
    """Its global number; None for what is no expert's."""
    homes: range | list[int]
    """Ranks that hold it, or a slice of it."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape.size) * self.shape.dtype.itemsize


@dataclass
class Shard:
    """A file that one rank writes."""

    writer: int
    items: list[Item] = field(default_factory=list)
    name: str = ""

    @property
    def shapes(self) -> dict[str, Shape]:
        """What goes into it."""
        return {item.name: item.shape for item in self.items}


def items_of(held: Mapping[str, Held], mesh: Mesh) -> Iterator[Item]:
    """Everything to be written of one group, in the same order on all ranks."""
    for name, part in held.items():
        size, stack = tuple(part.tensor.shape), part.stack
        if stack is None:
            size = (part.rows, *size[1:]) if size else size
            yield Item(name, name, Shape(part.tensor.dtype, size), None, _homes(part, None, mesh))
            continue
        one = list(size[1:])
        if stack.slices > 1:
            one[stack.axis] *= stack.slices
        shape = Shape(part.tensor.dtype, tuple(one))
        for expert in range(stack.num_experts):
            yield Item(name_in_files(name, expert), name, shape, expert, _homes(part, expert, mesh))


def shards(groups: Mapping[str, Mapping[str, Held]], mesh: Mesh) -> dict[str, list[Shard]]:
    """Who writes what, by group: each rank about as many bytes as it can be.

    What one rank alone holds is dealt out first, then the rest, the largest first, to whoever has least.
    """
    load = [0] * mesh.world
    everything = [(group, item) for group, held in groups.items() for item in items_of(held, mesh)]
    order = sorted(range(len(everything)), key=lambda i: (len(everything[i][1].homes), -everything[i][1].nbytes))
    writers = [0] * len(everything)
    for place in order:
        item = everything[place][1]
        writers[place] = min(item.homes, key=lambda rank: load[rank])
        load[writers[place]] += item.nbytes
    plan: dict[str, list[Shard]] = {}
    for group in groups:
        of_rank: dict[int, list[Item]] = {}
        for (owner, item), writer in zip(everything, writers, strict=True):
            if owner == group:
                of_rank.setdefault(writer, []).append(item)
        files = [shard for rank in sorted(of_rank) for shard in _cut(rank, of_rank[rank])]
        for number, shard in enumerate(files, start=1):
            shard.name = f"{group}-{number:05d}-of-{len(files):05d}.safetensors"
        plan[group] = files
    return plan


def wholes(
    groups: Mapping[str, Mapping[str, Held]], plan: Mapping[str, list[Shard]], mesh: Mesh
) -> Iterator[tuple[Shard, Item, Tensor]]:
    """What this rank writes, one tensor at a time. A collective call where experts are sliced, or tensors cut by rows:
    exhaust it.

    Slices meet one expert's tensor at a time, on the ranks of one replica; rows one tensor at a time, on all ranks.
    """
    for group, held in groups.items():
        for shard in plan[group]:
            for item in shard.items:
                part = held[item.held]
                stack, mine = part.stack, shard.writer == mesh.rank
                if stack is not None and stack.slices > 1:
                    if mesh.rank not in _neighbours(shard.writer, stack.slices):
                        continue
                    what = f"gathering the slices of {item.name}"
                    parts = all_gather_rows(part.tensor.detach().unsqueeze(0), _slice_group(mesh, stack.slices), what)
                    if mine:
                        yield shard, item, join_slices(parts, stack.slices, stack.axis + 1)[0]
                elif stack is None and part.cut is not None:
                    whole = join_rows(part.tensor, part.cut, mesh, f"gathering the rows of {item.name}")
                    if mine:
                        yield shard, item, whole
                elif mine:
                    yield shard, item, part.tensor.detach() if item.expert is None else _local(part, item.expert, mesh)


def form_slice_groups(found: Mapping[str, Stack], mesh: Mesh) -> None:
    """Form the groups that `wholes` needs. A collective call."""
    for slices in _slice_counts(found.values()):
        _slice_group(mesh, slices)


def read_held(held: Mapping[str, Held], source: Tensors, mesh: Mesh) -> None:
    """Fill this rank's tensors from files, reading what it holds; nothing is certain before `source.settle()`.

    Of what is cut, experts in slices and rows, each tensor is read by one rank, and its parts dealt out
    (`swinmoe.checkpoint.deal`): a collective call, after which ranks must agree on how it went, before the next.

    Raises:
        CheckpointError: names or shapes are not those of `held`; names the first ones.
        DamagedError: a file is not what was written; names it and the tensor.
    """
    _check_fit(held, source, mesh)
    dealers = {
        n: Dealer(_slice_group(mesh, n), mesh.rank % n, n) for n in _slice_counts(p.stack for p in held.values())
    }
    rows = Dealer(mesh.world_group, mesh.rank, mesh.world)
    problem: CheckpointError | None = None
    for name, part in held.items():
        stack, cut = part.stack, part.cut
        if part.holders is not None and mesh.rank not in part.holders:
            continue
        if stack is not None and stack.slices > 1:
            key, width = name_in_files(name, mesh.ep_rank // stack.slices), part.tensor.shape[stack.axis + 1]
            dealers[stack.slices].fill(part.tensor[0], source, key, stack.axis, [width] * stack.slices)
            continue
        if stack is None and cut is not None:
            lengths = [max(0, min(cut.share, cut.rows - rank * cut.share)) for rank in range(mesh.world)]
            rows.fill(part.tensor, source, name, 0, lengths)
            continue
        try:
            if stack is None:
                source.read_into(name, part.tensor)
                continue
            for local in range(part.tensor.shape[0]):
                source.read_into(name_in_files(name, _first_expert(part, mesh) + local), part.tensor[local])
        except CheckpointError as error:  # others wait for what this rank is to deal out
            problem = problem or error
    problem = next((found for found in (problem, rows.problem, *(d.problem for d in dealers.values())) if found), None)
    if problem is not None:
        raise problem


def _check_fit(held: Mapping[str, Held], source: Tensors, mesh: Mesh) -> None:
    wanted = {item.name: item.shape.size for item in items_of(held, mesh)}
    problems = [
        *_listed("lacks", [name for name in wanted if name not in source]),
        *_listed("has, and this config has no place for,", [name for name in source if name not in wanted]),
        *_listed(
            "has other shapes of",
            [
                f"{name} {source.entry(name).shape} where this config has {size}"
                for name, size in wanted.items()
                if name in source and source.entry(name).shape != size
            ],
        ),
    ]
    if problems:
        raise CheckpointError(f"{source.label} does not fit this config: it {'; it '.join(problems)}")


def _listed(what: str, names: list[str]) -> Iterable[str]:
    if names:
        yield f"{what} {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _homes(part: Held, expert: int | None, mesh: Mesh) -> range | list[int]:
    """Ranks that hold an expert, or a slice of it; or, of no expert, the tensor, or rows of it."""
    homes: range | list[int] = range(mesh.world)
    if expert is not None and part.cut is not None:
        homes = [expert // part.cut.share]
    elif expert is not None and part.stack is not None and part.stack.spread:
        stack = part.stack
        each = max(1, stack.num_experts // mesh.ep_size)
        places = range(expert * stack.slices, (expert + 1) * stack.slices) if stack.slices > 1 else [expert // each]
        homes = [replica * mesh.ep_size + place for replica in range(mesh.replicas) for place in places]
    return homes if part.holders is None else [rank for rank in homes if rank in part.holders]


def _first_expert(part: Held, mesh: Mesh) -> int:
    """Number of the first expert here."""
    assert part.stack is not None
    if part.cut is not None:
        return part.cut.first
    return mesh.ep_rank * part.tensor.shape[0] if part.stack.spread else 0


def _local(part: Held, expert: int, mesh: Mesh) -> Tensor:
    """One expert's tensor out of this rank's stack, a view."""
    return part.tensor.detach()[expert - _first_expert(part, mesh)]


def _neighbours(rank: int, slices: int) -> range:
    """The ranks that hold the slices of one expert: expert groups are runs of ranks, and slices runs inside them."""
    first = rank // slices * slices
    return range(first, first + slices)


def _slice_counts(found: Iterable[Stack | None]) -> list[int]:
    """Into how many slices experts are cut, in the same order on all ranks."""
    return sorted({stack.slices for stack in found if stack is not None and stack.slices > 1})


def _slice_group(mesh: Mesh, slices: int) -> torch.distributed.ProcessGroup | None:
    return mesh.group_of([list(range(i, i + slices)) for i in range(0, mesh.world, slices)], "slices of one expert")


def _cut(rank: int, items: list[Item]) -> Iterator[Shard]:
    shard, size = Shard(rank), 0
    for item in items:
        if shard.items and size + item.nbytes > SHARD_BYTES:
            yield shard
            shard, size = Shard(rank), 0
        shard.items.append(item)
        size += item.nbytes
    yield shard
