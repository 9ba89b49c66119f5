"""One optimiser to look at, whatever shares its work: moments dealt out over ranks, parameters cut over ranks, or both.

AdamW has three kinds of parameters to step, which need instances of their own:
    dense      equal on all ranks: ZeRO deals their moments out over the world
    experts    equal on replicas only: ZeRO deals theirs out over the replicas of this rank's experts
    cut        dense ones that FSDP2 has cut: a foreach call takes these or plain tensors, never both
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, overload

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from swinmoe.parallel.cut import is_cut
from swinmoe.parallel.expert_parameter import is_expert_parameter
from swinmoe.parallel.mesh import Mesh

Groups = list[dict[str, Any]]


class SplitOptimizer(Optimizer):
    """Optimisers of disjoint parameters that step as one.

    `state` is one mapping for all of them. What another rank steps is in it as tensors without storage (device `meta`),
    so that all ranks know the same names and shapes; `holders` says where the values are.

    Args:
        parts: the optimisers; their groups are shared, not copied.
        holders: global ranks that hold a parameter's state, where not all do that hold the parameter.
        rank: this one.
    """

    def __init__(self, parts: Sequence[Optimizer], holders: Mapping[Tensor, frozenset[int]], rank: int) -> None:
        super().__init__([{"params": group["params"]} for part in parts for group in part.param_groups], {})
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        self.holders = dict(holders)
        self._elsewhere = [p for p, ranks in holders.items() if rank not in ranks]
        for part in parts:
            stepping = getattr(part, "optim", part)  # what a sharding optimiser steps its own share with
            stepping.state = self.state

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> NoReturn: ...

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of every parameter; a collective call where ranks share the work. Takes no closure."""
        assert closure is None, "gradients are summed and clipped before a step, and cannot be asked for again"
        for part in self.parts:
            part.step()
        for parameter in self._elsewhere:
            if parameter.grad is not None and parameter not in self.state:
                self.state[parameter] = absent_moments(parameter)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any optimiser, a part at a time: a foreach call takes tensors of one kind."""
        for part in self.parts:
            part.zero_grad(set_to_none)


def absent_moments(parameter: Tensor) -> dict[str, Tensor]:
    """Names, shapes and types of AdamW's state of a parameter, without values."""
    like = torch.empty_like(parameter, device="meta")
    # Fused AdamW counts its steps in float32, whatever the parameters are.
    return {"step": torch.empty((), device="meta", dtype=torch.float32), "exp_avg": like, "exp_avg_sq": like}


def holders_of(optimizer: Optimizer, parameter: Tensor) -> frozenset[int] | None:
    """Global ranks that hold a parameter's moments; None = all that hold the parameter."""
    return optimizer.holders.get(parameter) if isinstance(optimizer, SplitOptimizer) else None


def make_adamw(groups: Groups, mesh: Mesh, **settings: Any) -> Optimizer:
    """Fused AdamW over `groups`, its moments dealt out over ranks where `mesh.config.zero` asks for that.

    Args:
        groups: as `torch.optim` takes them.
        mesh: this rank's place. With ZeRO a collective call.
        settings: of AdamW.

    Raises:
        BackendUnavailableError: `parallel.zero` without FairScale.
    """

    everything = [p for group in groups for p in group["params"]]
    # Without storage (`swinmoe plan --dry-run`) there is no kernel, and one by one is as good.
    settings |= {"foreach": False} if any(p.is_meta for p in everything) else {"fused": True}

    def make(own: Groups) -> Optimizer:
        return AdamW(own, **settings)

    zero = mesh.config.zero and mesh.world > 1
    if not zero and not any(is_cut(p) for p in everything):
        return make(groups)
    parts: list[Optimizer] = []
    holders: dict[Tensor, frozenset[int]] = {}
    for kind, sharing in ((_DENSE, mesh.world_group), (_EXPERT, mesh.replica_group), (_CUT, None)):
        own = _only(groups, kind)
        if not own:
            continue
        if zero and sharing is not None:
            from swinmoe.parallel.zero import shard_moments

            part, owner = shard_moments(own, sharing, settings)
            for parameter, place in owner.items():
                # The ranks of a replica step other experts under the same name: each the part that it holds.
                alike = range(place * mesh.ep_size, (place + 1) * mesh.ep_size) if kind == _EXPERT else (place,)
                holders[parameter] = frozenset(alike)
            parts.append(part)
        else:
            parts.append(make(own))
    return parts[0] if len(parts) == 1 and not holders else SplitOptimizer(parts, holders, mesh.rank)


_DENSE, _EXPERT, _CUT = "dense", "expert", "cut"


def _kind(parameter: Tensor) -> str:
    if is_cut(parameter):
        return _CUT
    return _EXPERT if is_expert_parameter(parameter) else _DENSE


def _only(groups: Groups, kind: str) -> Groups:
    """`groups` with the parameters of one kind; those that have none are left out."""
    chosen = [{**group, "params": [p for p in group["params"] if _kind(p) == kind]} for group in groups]
    return [group for group in chosen if group["params"]]
