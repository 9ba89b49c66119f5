"""Peak memory of a step by what it is for, in bytes that tensors hold.

Every operator's results are seen as they are made, and their storage until it is given back, on CPU and CUDA alike. So
this is what the program keeps, to the byte and the same on every run; not what an allocator has reserved for it, nor
what a kernel uses within itself. The breakdown is that of the moment at which the sum was largest.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swinmoe.comm import all_gather_rows
from swinmoe.moe import phases
from swinmoe.moe.layer import MoEMlp
from swinmoe.parallel import Mesh

CLASSES = ("dense", "experts", "optimizer", "dispatch", "activations")
"""dense, experts: parameters with their gradients; dispatch: what was made while routing, scattering, exchanging (with
gathered weights) and gathering; activations: everything else, inputs too."""
_DISPATCH = frozenset(phases.LAYER_PHASES) - {"experts"}


class MemoryTracker(TorchDispatchMode):
    """Counts live bytes by class while it is active.

    Args:
        owned: tensors that are there already, by class; of those that share a storage, the first counts.
    """

    def __init__(self, owned: Mapping[str, Iterable[Tensor]]) -> None:
        super().__init__()
        self.live = dict.fromkeys(CLASSES, 0)
        self.at_peak = dict(self.live)
        self._alive: dict[int, weakref.ref[Any]] = {}
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

    def _see(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = weakref.ref(storage, partial(self._gone, key, kind, size))
        self.live[kind] += size
        if sum(self.live.values()) > self.peak:
            self.at_peak = dict(self.live)

    def _gone(self, key: int, kind: str, size: int, _: object) -> None:
        del self._alive[key]
        self.live[kind] -= size


def peak_memory(
    step: Callable[[], Any],
    module: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    inputs: Iterable[Tensor] = (),
) -> dict[str, int]:
    """Bytes by class (see `CLASSES`) at the peak of one `step`, and their sum as `peak`.

    Args:
        step: run once; warm it up before, so that gradients exist.
        module: whose parameters and gradients are told apart.
        optimizer: whose state counts.
        inputs: tensors that the step uses and that exist already.
    """
    experts = {id(p) for layer in module.modules() if isinstance(layer, MoEMlp) for p in layer.experts.parameters()}
    owned: dict[str, list[Tensor]] = {kind: [] for kind in CLASSES}
    for parameter in module.parameters():
        kind = "experts" if id(parameter) in experts else "dense"
        owned[kind] += [parameter] if parameter.grad is None else [parameter, parameter.grad]
    owned["dense"] += list(module.buffers())
    if optimizer is not None:
        moments = (t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
        owned["optimizer"] += [t for t in moments if not t.is_meta]  # with ZeRO, other ranks' are names only
    owned["activations"] += [t for x in inputs for t in (x, x.grad) if t is not None]
    tracker = MemoryTracker(owned)
    with tracker, phases.listen(tracker):
        step()
    return {**tracker.at_peak, "peak": tracker.peak}


def worst_memory(found: dict[str, int], mesh: Mesh) -> dict[str, int]:
    """Of all ranks' peaks the highest, with its classes."""
    names = [*CLASSES, "peak"]
    ranks = all_gather_rows(torch.tensor([[found[name] for name in names]]), mesh.world_group, "comparing memory")
    highest = ranks[int(ranks[:, -1].argmax())]
    return dict(zip(names, (int(n) for n in highest), strict=True))
