"""How expert layers run when there is more than one process: what travels, tokens or weights or both.

Both are compositions of two executions: `WeightsTravel` gathers the weights of neighbouring ranks and hands on, and
`TokensTravel` carries rows between ranks that do not share weights. Neither owns parameters.
"""

from __future__ import annotations

from torch import Tensor

from swinmoe.comm import all_gather_sum, all_reduce_sum
from swinmoe.comm.all_to_all import Group
from swinmoe.config import ParallelConfig
from swinmoe.moe.execution import LocalExecution
from swinmoe.moe.types import ExpertExecution, ExpertFn, ExpertRows, ExpertWeights, Route
from swinmoe.parallel.expert_parameter import join_slices
from swinmoe.parallel.mesh import Mesh
from swinmoe.parallel.tokens_travel import TokensTravel


def make_execution(config: ParallelConfig, mesh: Mesh, num_experts: int, layer: str) -> ExpertExecution:
    """The execution of one layer on this rank; a collective call.

    Args:
        config: how tokens and weights travel.
        mesh: this rank's place.
        num_experts: E of the layer.
        layer: its name, for errors.
    """
    if mesh.ep_size == 1:
        return Replicated(mesh.world_group, layer)
    slices = mesh.slices(num_experts)
    joined = min(config.weight_group, slices)  # slices of one expert that meet in a weight group
    tokens: ExpertExecution = Replicated(mesh.world_group, layer)
    if config.token_group > 1:
        tokens = TokensTravel(
            mesh.token_group(config),
            slices=slices // joined,
            chunks=config.chunks,
            payload=config.payload,
            batch=mesh.world_group,
            layer=layer,
        )
    if config.weight_group == 1:
        return tokens
    return WeightsTravel(mesh.weight_group(config), joined, tokens, layer)


class Replicated:
    """Every rank has all experts and keeps its rows; only statistics are summed.

    Args:
        batch: the ranks that share a batch.
        layer: the layer's name in errors.
    """

    def __init__(self, batch: Group, layer: str = "expert layer") -> None:
        self.batch, self.layer = batch, layer
        self._local = LocalExecution()

    def prepare(self, counts: Tensor, slots: int | None) -> Route:
        """As on one process; no traffic."""
        return self._local.prepare(counts, slots)

    def run(self, x: ExpertRows, route: Route, w: ExpertWeights, fn: ExpertFn) -> Tensor:
        """As on one process; no traffic."""
        return self._local.run(x, route, w, fn)

    def reduce(self, stats: Tensor) -> Tensor:
        """Sum over all ranks, with the identity as its backward."""
        return all_reduce_sum(stats, self.batch, f"{self.layer}: summing statistics")

    def __deepcopy__(self, memo: dict[int, object]) -> Replicated:
        return self


class WeightsTravel:
    """Each rank of a group gathers the weights of all, so that tokens need not travel between them (Tutel's r = 0).

    One gather a forward pass, and one reduce-scatter a backward pass, which sums the group's gradients of each weight
    where it is at home. It pays where tokens outweigh the weights.

    Args:
        group: neighbouring ranks; what they hold together is whole experts, or larger slices of one.
        slices: slices of one expert among them; 1 = they hold whole experts.
        then: how rows meet the gathered weights.
        layer: the layer's name in errors.
    """

    def __init__(self, group: Group, slices: int, then: ExpertExecution, layer: str = "expert layer") -> None:
        self.group, self.slices, self.then, self.layer = group, slices, then, layer

    def prepare(self, counts: Tensor, slots: int | None) -> Route:
        """As the inner execution."""
        return self.then.prepare(counts, slots)

    def run(self, x: ExpertRows, route: Route, w: ExpertWeights, fn: ExpertFn) -> Tensor:
        """Expert outputs in the order and shape of `x.rows`."""
        return self.then.run(x, route, self._gathered(w), fn)

    def reduce(self, stats: Tensor) -> Tensor:
        """As the inner execution."""
        return self.then.reduce(stats)

    def _gathered(self, w: ExpertWeights) -> ExpertWeights:
        axes = {"fc1": 1, "b1": 1, "fc2": 2, "b2": 1}  # of an expert's slices
        present = {name: tensor for name in axes if (tensor := getattr(w, name)) is not None}
        parts = all_gather_sum(list(present.values()), self.group, f"{self.layer}: gathering expert weights")
        whole = {name: join_slices(part, self.slices, axes[name]) for name, part in zip(present, parts, strict=True)}
        return ExpertWeights(whole["fc1"], whole.get("b1"), whole["fc2"], whole.get("b2"))

    def __deepcopy__(self, memo: dict[int, object]) -> WeightsTravel:
        return self
