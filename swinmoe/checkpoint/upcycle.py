"""Dense -> sparse: expert layers that start as cuts of the MLPs they replace (Komatsuzaki et al. 2023).

Shapes: E experts, D width, F hidden units of the dense MLP, w of an expert, R rows of fc1 per hidden unit (SwiGLU: 2).
How experts are cut and scaled, and why outputs stay what they were, is in `upcycle_plan`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from swinmoe.checkpoint.load_report import LoadReport
from swinmoe.checkpoint.naming import to_files
from swinmoe.checkpoint.upcycle_plan import ExpertPlan, plan_experts, undecided
from swinmoe.config.checks import at_least, below_one, check_ranges
from swinmoe.errors import CheckpointError, ConfigError
from swinmoe.models import SwinTransformer
from swinmoe.moe import MoEMlp
from swinmoe.moe.routers import CosineRouter, LinearRouter
from swinmoe.parallel import is_expert_parameter
from swinmoe.randomness import generator


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How experts start from a dense MLP. The defaults copy it, and keep the model's function to rounding."""

    noise: float = 0.0
    """Standard deviation of Gaussian noise on every expert's matrices, over that of the matrix itself."""
    drop: float = 0.0
    """Share of each expert's hidden units that are drawn anew, with mean and deviation of the parent's weights:
    drop-upcycling (Nakamura et al. 2025, who found 0.5 best)."""
    shuffle: bool = False
    """Experts narrower than the MLP: each group of them cuts the hidden units in a random order of its own."""
    preserve: bool = True
    """Refuse a layer that cannot compute the MLP's function; False: take it, with its router's initial values."""
    seed: int = 0
    """Of noise, drop and shuffle; each draw depends on (seed, layer, expert) only."""

    def __post_init__(self) -> None:
        check_ranges(self, "upcycling", noise=at_least(0, "use 0 for none"), drop=below_one())


@dataclass(frozen=True)
class DenseMlp:
    """Weights of fc2·act(fc1 x + b1) + b2, laid out as in `nn.Linear`; or anything of their shapes (moments)."""

    fc1: Tensor
    """(R·F, D); SwiGLU: rows 2i and 2i + 1 are value and gate of hidden unit i."""
    b1: Tensor | None
    """(R·F,)"""
    fc2: Tensor
    """(D, F)"""
    b2: Tensor | None
    """(D,)"""

    @property
    def hidden(self) -> int:
        """F."""
        return int(self.fc2.shape[1])

    @staticmethod
    def of(state: Mapping[str, Tensor], name: str, suffix: str = "") -> DenseMlp:
        """The MLP called `name` in a state dict; `CheckpointError` if a matrix is missing."""
        try:
            fc1, fc2 = (state[f"{name}.{part}.weight{suffix}"] for part in ("fc1", "fc2"))
        except KeyError as error:
            raise CheckpointError(
                f"the dense weights have no {error.args[0]!r}, from which experts of {name!r} would start; give a "
                "dense model with an MLP in that block"
            ) from error
        return DenseMlp(fc1, state.get(f"{name}.fc1.bias{suffix}"), fc2, state.get(f"{name}.fc2.bias{suffix}"))


def upcycle(
    dense: nn.Module | Mapping[str, Tensor],
    sparse: SwinTransformer,
    how: Upcycling | None = None,
    *,
    source: str = "the dense model",
    allow: Sequence[str] = (),
) -> LoadReport:
    """Load dense weights into a sparse model: experts start as cuts of MLPs, all else is taken as it is.

    With the defaults, logits are those of the dense model where no choice is dropped (to rounding; moe.dropout off).

    Args:
        dense: a `SwinTransformer` or its state dict, e.g. that of any import; the same sizes as `sparse`.
        sparse: filled in place. Its routers keep their initial values, or lose their preferences (`upcycle_plan`).
        how: copy, noise, drop, cut; None = `Upcycling()`.
        source: what `dense` is, for messages.
        allow: patterns of names that may be missing, unused or of another shape (and keep their initial values).

    Returns:
        What became of every tensor, by the names that files have.

    Raises:
        ConfigError: layers that cannot start from such MLPs; says which key to change.
        CheckpointError: weights are missing, left over or of other shapes. Nothing has been changed then.
    """
    how = how or Upcycling()
    layers = sparse.moe_layers()
    if not layers:
        raise ConfigError("upcycle needs a sparse model to fill, and this one is dense; set model.moe and moe_blocks")
    state = dict(dense.state_dict()) if isinstance(dense, nn.Module) else dict(dense)
    if any(f"{name}.experts." in key for key in state for name in layers):
        raise CheckpointError(f"{source} is sparse already; load it as it is, or grow, prune or merge its experts")
    parents = {name: DenseMlp.of(state, name) for name in layers}
    plans = {name: check_parent(layer, parents[name], how, name) for name, layer in layers.items()}
    taken = {key for key in state if key.rpartition(".fc")[0] in layers}
    report = _match(state, sparse, layers, taken, source, allow).check(allow)
    own = sparse.state_dict()
    with torch.no_grad():
        for name in (*report.loaded, *report.resized):
            if name in state:
                own[name].copy_(state[name])
    for name, layer in layers.items():
        fill_layer(layer, parents[name], plans[name], how)
    return report


def check_parent(layer: MoEMlp, parent: DenseMlp, how: Upcycling, name: str, *, moments: bool = False) -> ExpertPlan:
    """How `layer` is cut from `parent` (or from its `moments`, of which any may be lost); nothing is changed.

    Raises:
        ConfigError: the layer has no place for something that the MLP has, or see `plan_experts`.
    """
    if any(is_expert_parameter(parameter) for parameter in layer.parameters()):
        raise ConfigError(f"the experts of {name!r} are spread over processes; upcycle first and spread afterwards")
    if layer.dim != parent.fc2.shape[0] or layer.hidden_dim != parent.hidden:
        raise ConfigError(
            f"{name!r} stands for an MLP of width {layer.dim} and {layer.hidden_dim} hidden units, and is given one of "
            f"{parent.fc2.shape[0]} and {parent.hidden}; use the same embed_dim and mlp_ratio"
        )
    if layer.experts.activation.rows_per_hidden * parent.hidden != parent.fc1.shape[0]:
        raise ConfigError(
            f"moe.experts.type={layer.cfg.experts.type!r} has another first matrix than the MLP {name!r} "
            f"{tuple(parent.fc1.shape)}; use experts that compute what it does, such as 'gelu'"
        )
    cfg = layer.cfg.experts
    if moments:
        return plan_experts(layer.cfg, parent.hidden, preserve=how.preserve)
    if not cfg.fc1_bias and _is_something(parent.b1):
        raise ConfigError(f"the MLP {name!r} has a first bias and its experts would not; set moe.experts.fc1_bias=true")
    if cfg.fc2_bias != "learned" and _is_something(parent.b2):
        raise ConfigError(
            f"the MLP {name!r} has a second bias and moe.experts.fc2_bias={cfg.fc2_bias!r} has no place for it; set "
            "moe.experts.fc2_bias='learned'"
        )
    plan = plan_experts(layer.cfg, parent.hidden, preserve=how.preserve)
    if plan.parts > 1:
        router_axes(layer)  # refuses a router whose experts cannot be given equal scores
    return plan


@torch.no_grad()
def fill_layer(layer: MoEMlp, parent: DenseMlp, plan: ExpertPlan, how: Upcycling) -> None:
    """Let the experts of `layer` start as cuts of `parent`, as planned by `check_parent`."""
    units = hidden_units(layer, plan, how)
    by_routed = routed_share(plan, layer)
    one = torch.ones_like(by_routed)
    bias = (1 - plan.shared_share) / plan.gate_sum
    _copy(cut(parent, units, one, by_routed * plan.scale, bias), layer.experts)
    _perturb(layer, units, how)
    if layer.shared is not None:
        everyone = torch.arange(layer.shared.fc2_weight.shape[2]).unsqueeze(0)
        _copy(cut(parent, everyone, one, one * plan.shared_share, plan.shared_share), layer.shared)
    _prepare_router(layer, plan)


def hidden_units(layer: MoEMlp, plan: ExpertPlan, how: Upcycling) -> Tensor:
    """(E, w) int64: which of the parent's hidden units each expert holds."""
    width = layer.experts.fc2_weight.shape[2]
    whole = torch.arange(plan.first, layer.hidden_dim)
    rows = []
    for expert in range(layer.num_experts):
        group, part = divmod(expert, plan.parts)
        order = whole
        if how.shuffle:
            order = whole[torch.randperm(len(whole), generator=generator(how.seed, layer.name, "order", group))]
        rows.append(order[part * width : (part + 1) * width])
    return torch.stack(rows)


def routed_share(plan: ExpertPlan, layer: MoEMlp) -> Tensor:
    """(F,) float64: the share of each hidden unit that routed experts compute, 1 or what the shared expert leaves."""
    share = torch.ones(layer.hidden_dim, dtype=torch.float64)
    if layer.shared is not None:
        share[: layer.shared.fc2_weight.shape[2]] -= plan.shared_share
    return share


def cut(parent: DenseMlp, units: Tensor, fc1: Tensor, fc2: Tensor, bias: float) -> dict[str, Tensor]:
    """Experts that hold `units` (n, w) of `parent`, stacked.

    Args:
        parent: the MLP, or moments of its weights.
        units: hidden units of each expert.
        fc1, fc2: (F,) factor of each hidden unit's rows of fc1 and b1, and of its column of fc2.
        bias: factor of b2.
    """
    units = units.to(parent.fc1.device)
    fc1, fc2 = (factor.to(parent.fc1)[units] for factor in (fc1, fc2))  # (n, w)
    found = {
        "fc1_weight": (parent.fc1.unflatten(0, (parent.hidden, -1))[units] * fc1[..., None, None]).flatten(1, 2),
        "fc2_weight": parent.fc2.T[units].mul(fc2.unsqueeze(-1)).transpose(1, 2),
    }
    if parent.b1 is not None:
        found["fc1_bias"] = (parent.b1.unflatten(0, (parent.hidden, -1))[units] * fc1.unsqueeze(-1)).flatten(1)
    if parent.b2 is not None:
        found["fc2_bias"] = (parent.b2 * bias).expand(len(units), -1)
    return found


def _is_something(bias: Tensor | None) -> bool:
    return bias is not None and bool(bias.any())


def _copy(values: Mapping[str, Tensor], experts: nn.Module) -> None:
    for name, parameter in experts.named_parameters():
        # What the parent lacks is a bias, and 0.
        value = values.get(name)
        parameter.zero_() if value is None else parameter.copy_(value)


def _perturb(layer: MoEMlp, units: Tensor, how: Upcycling) -> None:
    """Noise and fresh units: experts that differ from the first step on."""
    rows = layer.experts.activation.rows_per_hidden
    for expert in range(layer.num_experts):
        fresh = fresh_units(layer, expert, units.shape[1], how)
        for name, parameter in layer.experts.named_parameters():
            if name == "fc2_bias" or not (how.noise or len(fresh)):
                continue
            values, rng = parameter[expert], generator(how.seed, layer.name, name, expert)
            std, mean = torch.std_mean(values.float(), correction=0)
            if len(fresh):
                axis, where = (1, fresh) if name == "fc2_weight" else (0, rows_of(fresh, rows))
                where = where.to(values.device)
                drawn = torch.randn(values.index_select(axis, where).shape, generator=rng).to(std) * std + mean
                values.index_copy_(axis, where, drawn.to(values))
            if how.noise and name != "fc1_bias":
                values += (torch.randn(values.shape, generator=rng).to(std) * (how.noise * std)).to(values)


def fresh_units(layer: MoEMlp, expert: int, width: int, how: Upcycling) -> Tensor:
    """Hidden units of `expert` (its own numbers, below `width`) that drop-upcycling draws anew."""
    order = torch.randperm(width, generator=generator(how.seed, layer.name, "drop", expert))
    return order[: round(how.drop * width)]


def rows_of(units: Tensor, rows: int) -> Tensor:
    """Rows of fc1 that belong to hidden units."""
    return (units.unsqueeze(1) * rows + torch.arange(rows)).flatten()


def _prepare_router(layer: MoEMlp, plan: ExpertPlan) -> None:
    router = layer.router
    if plan.parts > 1:
        leader = torch.arange(layer.num_experts) // plan.parts * plan.parts
        for parameter, axis in router_axes(layer):
            parameter.copy_(parameter.index_select(axis, leader.to(parameter.device)))
    if not plan.undecided:
        return
    if isinstance(router, LinearRouter):
        router.weight.mul_(undecided(router.weight.dtype))
    elif isinstance(router, CosineRouter):
        # One dimension that no token has yet, and in which all experts lie: their cosines with tokens are next to 0.
        length = router.sim_matrix.norm(dim=0).mean()
        router.projector.weight[-1] = 0
        router.projector.bias[-1] = 0
        router.sim_matrix.mul_(undecided(router.sim_matrix.dtype))
        router.sim_matrix[-1] = length


def router_axes(layer: MoEMlp) -> list[tuple[Tensor, int]]:
    """Every tensor of the layer's router that counts experts, and along which axis.

    Raises:
        ConfigError: a router of another kind, of which that is not known.
    """
    router = layer.router
    if isinstance(router, LinearRouter):
        found: list[tuple[Tensor, int]] = [(router.weight, 0)]
    elif isinstance(router, CosineRouter):
        found = [(router.sim_matrix, 1)]
    else:
        raise ConfigError(
            f"it is not known which weights of router.type={layer.cfg.router.type!r} belong to which expert; use "
            "'linear' or 'cosine'"
        )
    return found if router.expert_bias is None else [*found, (router.expert_bias, 0)]


def _match(
    state: Mapping[str, Tensor],
    sparse: SwinTransformer,
    layers: Mapping[str, MoEMlp],
    taken: set[str],
    source: str,
    allow: Sequence[str],
) -> LoadReport:
    """What `upcycle` will do with every tensor outside MLPs that become experts, and with those."""
    loaded, missing, unused = [], [], []
    kept: dict[str, str] = {}
    cast: dict[str, str] = {}
    own = sparse.state_dict()
    for name, tensor in to_files(own).items():
        layer = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        if layer is not None and ".router." in name:
            kept[name] = "a dense model has no router"
            continue
        origin = name if layer is None else f"{layer}.fc1.weight"
        if origin not in state:
            missing.append(name)
        elif state[origin].is_floating_point() != tensor.is_floating_point() or state[origin].is_complex():
            raise CheckpointError(
                f"{source}: {origin!r} is {state[origin].dtype} and the model needs {tensor.dtype}; give the weights "
                "that were trained"
            )
        elif layer is not None or state[name].shape == tensor.shape:
            if state[origin].dtype == tensor.dtype:
                loaded.append(name)
            else:
                cast[name] = f"{state[origin].dtype} -> {tensor.dtype}".replace("torch.", "")
        elif any(fnmatchcase(name, pattern) for pattern in allow):
            kept[name] = f"{tuple(state[name].shape)} in the source, {tuple(own[name].shape)} here"
        else:
            raise CheckpointError(
                f"{source}: {name!r} is {tuple(state[name].shape)} and the model needs {tuple(own[name].shape)}; use "
                "a config of the same sizes, or allow it by name to keep its initial values"
            )
    unused = [name for name in state if name not in own and name not in taken]
    return LoadReport(source, tuple(loaded), cast, kept, tuple(unused), tuple(missing))
