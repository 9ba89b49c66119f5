"""Peak memory of a step by what it is for, in bytes that tensors hold.

Every operator's results are seen as they are made, and their storage until it is given back, on CPU and CUDA alike. So
this is what the program keeps, to the byte and the same on every run; not what an allocator has reserved for it, nor
what a kernel uses within itself. The breakdown is that of the moment at which the sum was largest.

Compiled code shows no operators: a step is watched with its graphs set aside, and its memory is that of the same code
uncompiled.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swinmoe.comm import all_gather_rows
from swinmoe.moe import gradient_buffers, phases
from swinmoe.moe.layer import MoEMlp
from swinmoe.parallel import Mesh, local_part

CLASSES = ("dense", "experts", "optimizer", "dispatch", "activations")
"""dense, experts: parameters with their gradients, and the memory kept for these; dispatch: what was made while
routing, scattering, exchanging (with gathered weights) and gathering; activations: everything else, inputs too. Of
FSDP2's tensors the rows of this rank count, and what it gathers are activations."""
_DISPATCH = frozenset(phases.LAYER_PHASES) - {"experts"}


@dataclass
class _Block:
    """Bytes that one storage holds, or several share."""

    kind: str
    place: int
    """Address; of none, what tells it from others."""
    size: int
    number: int
    """In the order in which blocks were seen."""
    storages: int = 0


class MemoryTracker(TorchDispatchMode):
    """Counts live bytes by class while it is active.

    Args:
        owned: tensors that are there already, by class; of those that share memory, the first counts.
    """

    def __init__(self, owned: Mapping[str, Iterable[Tensor]]) -> None:
        super().__init__()
        self.live = dict.fromkeys(CLASSES, 0)
        self.at_peak = dict(self.live)
        self._alive: dict[int, tuple[weakref.ref[Any], _Block]] = {}
        self._blocks: dict[int, _Block] = {}
        self._seen = self._seen_at_peak = 0
        for kind, tensors in owned.items():
            for tensor in tensors:
                self._see(tensor, kind)

    @property
    def peak(self) -> int:
        """Bytes, all classes together."""
        return sum(self.at_peak.values())

    def crossed(self, direction: str, phase: str) -> None:
        """A listener's part; the phase is asked for where it is needed."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = "dispatch" if phases.current() in _DISPATCH else "activations"
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:  # sparse ones are made of such
                self._see(leaf, kind)
        return result

    def claim(self, tensor: Tensor, kind: str) -> None:
        """Its memory was of class `kind` from the beginning, whatever it seemed to be when it was made."""
        self._see(tensor, kind)
        _, block = self._alive[tensor.untyped_storage()._cdata]
        counts = [self.live] + [self.at_peak] * (block.number <= self._seen_at_peak)  # alive now, so it was then
        for count in counts:
            count[block.kind] -= block.size
            count[kind] += block.size
        block.kind = kind

    def resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP2 gives gathered parameters back this way, under storages that stay."""
        if storage._cdata in self._alive:
            _, block = self._alive[storage._cdata]
            self._gone(storage._cdata)
            self._hold(storage, block.kind)

    def _see(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:
            self._hold(storage, kind)

    def _hold(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = storage._cdata
        # Memory that is lent (`swinmoe.moe.gradient_buffers`) has several storages at one address.
        place = storage.data_ptr() or -key
        block = self._blocks.get(place)
        if block is None:
            self._seen += 1
            block = self._blocks[place] = _Block(kind, place, storage.nbytes(), self._seen)
            self.live[kind] += block.size
        block.storages += 1
        self._alive[key] = (weakref.ref(storage, partial(self._gone, key)), block)
        if sum(self.live.values()) > self.peak:
            self.at_peak, self._seen_at_peak = dict(self.live), self._seen

    def _gone(self, key: int, _: object = None) -> None:
        _, block = self._alive.pop(key)
        block.storages -= 1
        if not block.storages:
            del self._blocks[block.place]
            self.live[block.kind] -= block.size


def peak_memory(
    step: Callable[[], Any],
    module: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    inputs: Iterable[Tensor] = (),
) -> dict[str, int]:
    """Bytes by class (see `CLASSES`) at the peak of one `step`, and their sum as `peak`.

    Args:
        step: run once; warm it up before, so that gradients and moments exist. Gradients count with their
            parameters, from the moment they are made, if they are there at the optimiser's step or after this one.
        module: whose parameters and gradients are told apart.
        optimizer: whose state counts.
        inputs: tensors that the step uses and that exist already.
    """
    kinds = _kinds(module)
    tracker = MemoryTracker(_owned(kinds, module, optimizer, inputs))

    def claim_gradients(*_: Any) -> None:
        for parameter, kind in kinds.items():
            if parameter.grad is not None:
                tracker.claim(local_part(parameter.grad), kind)

    with ExitStack() as watching:
        watching.enter_context(_graphs_set_aside())
        if optimizer is not None:  # a step gives them back when it has used them
            watching.callback(optimizer.register_step_pre_hook(claim_gradients).remove)
        watching.enter_context(_resizes_told(tracker))
        watching.enter_context(tracker)
        watching.enter_context(phases.listen(tracker))
        step()
    claim_gradients()
    return {**tracker.at_peak, "peak": tracker.peak}


def _kinds(module: nn.Module) -> dict[nn.Parameter, str]:
    """The class of each parameter."""
    experts = {p for layer in module.modules() if isinstance(layer, MoEMlp) for p in layer.experts.parameters()}
    return {p: "experts" if p in experts else "dense" for p in module.parameters()}


def _owned(
    kinds: Mapping[nn.Parameter, str],
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    inputs: Iterable[Tensor],
) -> dict[str, list[Tensor]]:
    """What is there before a step, this rank's part of it. Not to be kept: a gradient would outlive `zero_grad`."""
    owned: dict[str, list[Tensor]] = {kind: [] for kind in CLASSES}
    for parameter, kind in kinds.items():
        own = (parameter, parameter.grad, gradient_buffers.kept(parameter))
        owned[kind] += [local_part(tensor) for tensor in own if tensor is not None]
    owned["dense"] += [local_part(buffer) for buffer in module.buffers()]
    if optimizer is not None:
        moments = (t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
        owned["optimizer"] += [local_part(t) for t in moments if not t.is_meta]  # with ZeRO, others' are names only
    owned["activations"] += [t for x in inputs for t in (x, x.grad) if t is not None]
    return owned


def _graphs_set_aside() -> AbstractContextManager[Any]:
    """Within it compiled code runs as it was before, also where a graph was insisted on."""
    compiler = "torch._dynamo" in sys.modules  # nothing is compiled before it is there, and it takes long to import
    return torch.compiler.set_stance("force_eager") if compiler else nullcontext()


@contextmanager
def _resizes_told(tracker: MemoryTracker) -> Iterator[None]:
    """A storage that is resized passes no dispatcher."""
    storages: Any = torch.UntypedStorage
    resize = storages.resize_

    def resize_and_tell(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        tracker.resized(storage)
        return result

    storages.resize_ = resize_and_tell
    try:
        yield
    finally:
        storages.resize_ = resize


def worst_memory(found: dict[str, int], mesh: Mesh) -> dict[str, int]:
    """Of all ranks' peaks the highest, with its classes."""
    names = [*CLASSES, "peak"]
    ranks = all_gather_rows(torch.tensor([[found[name] for name in names]]), mesh.world_group, "comparing memory")
    highest = ranks[int(ranks[:, -1].argmax())]
    return dict(zip(names, (int(n) for n in highest), strict=True))
