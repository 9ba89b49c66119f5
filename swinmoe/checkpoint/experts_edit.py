"""More experts, fewer, or others: models whose experts are copied, kept or dropped. Originals stay as they are.

Shapes: E experts before, E' after, K choices per token.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from swinmoe.checkpoint.upcycle import router_axes
from swinmoe.checkpoint.usage import ExpertUsage, usage_of
from swinmoe.config.moe import MoEConfig
from swinmoe.errors import ConfigError
from swinmoe.models import SwinTransformer
from swinmoe.moe import MoEMlp
from swinmoe.parallel import is_expert_parameter
from swinmoe.randomness import generator

Model = TypeVar("Model", bound=nn.Module)
Ids = Sequence[int]

TIE_BREAK = 1e-6
"""Relative difference between the router weights of an expert and its copy: enough for float32 to spread tokens over
both, and nothing in their gates."""


def keep_experts(model: Model, ids: Ids | Mapping[str, Ids]) -> Model:
    """A model with these experts only, in this order; the router chooses among them as it ranked them before.

    Args:
        model: a `SwinTransformer`, or any model with expert layers.
        ids: the experts to keep, the same in every layer, or by layer.

    Raises:
        ConfigError: an expert that does not exist or is named twice, fewer than `top_k`, or layers of a
            `SwinTransformer` that would keep different numbers.
    """
    layers = expert_layers(model)
    chosen = (
        dict.fromkeys(layers, tuple(ids)) if not isinstance(ids, Mapping) else {k: tuple(v) for k, v in ids.items()}
    )
    if set(chosen) != set(layers):
        raise ConfigError(f"experts to keep were named for layers {sorted(chosen)}; this model's are {sorted(layers)}")
    for name, layer in layers.items():
        _check_ids(name, layer, chosen[name])
    _check_equal(model, {name: len(kept) for name, kept in chosen.items()})
    made = {
        name: _gather(layer, chosen[name], replace(layer.cfg, num_experts=len(chosen[name])))
        for name, layer in layers.items()
    }
    return swap(model, made)


def prune_experts(model: Model, num_experts: int, usage: Mapping[str, ExpertUsage]) -> Model:
    """A model with the `num_experts` experts of each layer that were chosen most often.

    Raises:
        ConfigError: see `keep_experts`.
        RoutingError: `usage` is not this model's.
    """
    return keep_experts(model, most_chosen(model, num_experts, usage))


def most_chosen(model: Model, num_experts: int, usage: Mapping[str, ExpertUsage]) -> dict[str, list[int]]:
    """By layer, the numbers of the experts that `prune_experts` keeps; raises what it raises."""
    ids = {}
    for name, layer in expert_layers(model).items():
        if not layer.top_k <= num_experts <= layer.num_experts:
            raise ConfigError(
                f"{name!r} has {layer.num_experts} experts and visits {layer.top_k} of them; it can be pruned to "
                f"{layer.top_k} .. {layer.num_experts}, not to {num_experts}"
            )
        ranked = usage_of(usage, name).chosen.argsort(descending=True, stable=True)
        ids[name] = sorted(ranked[:num_experts].tolist())
    return ids


def grow_experts(
    model: Model,
    num_experts: int,
    usage: Mapping[str, ExpertUsage] | None = None,
    *,
    noise: float = 0.0,
    preserve: bool = True,
    seed: int = 0,
) -> Model:
    """A model with more experts: copies behind the old ones, as evenly as can be, of the busiest first.

    With noise 0 it computes what it did (where no choice is dropped): each expert becomes c = E'/E equal ones.

    - K = 1: a token's gate goes to any one of them; softmax shares it among them, so outputs are multiplied by c. The
      copies' router weights differ by 1e-6, so that both get tokens.
    - K > 1: the K best would be copies of each other, so a token visits all copies of its experts: top_k becomes c·K.

    Args:
        model: a `SwinTransformer`, or any model with expert layers.
        num_experts: E'.
        usage: whose copies come first where E' is no multiple of E; None = in order.
        noise: standard deviation of noise on the copies' matrices, over that of the matrix.
        preserve: refuse what changes the function; without, any E' is taken and K stays.
        seed: of noise.

    Raises:
        ConfigError: fewer experts than before, or (`preserve`) a number that cannot keep the function.
    """
    made = {}
    for name, layer in expert_layers(model).items():
        cfg, (copies, rest) = layer.cfg, divmod(num_experts, layer.num_experts)
        if copies < 1 or num_experts == layer.num_experts:
            raise ConfigError(f"{name!r} has {layer.num_experts} experts and cannot grow to {num_experts}; use more")
        even, softmax = rest == 0, cfg.router.score == "softmax"
        if preserve and not even and (softmax or cfg.top_k > 1):
            multiples = f"{layer.num_experts * 2} or {layer.num_experts * 3}"
            raise ConfigError(
                f"{name!r} cannot grow from {layer.num_experts} to {num_experts} experts and compute what it did, "
                f"because copies share their gate: use a multiple such as {multiples}, or preserve=False"
            )
        ranked = torch.arange(layer.num_experts)
        if usage is not None:
            ranked = usage_of(usage, name).chosen.argsort(descending=True, stable=True)
        everyone = list(range(layer.num_experts))
        ids = [*everyone * copies, *sorted(ranked[:rest].tolist())]
        together = preserve and cfg.top_k > 1
        new = replace(cfg, num_experts=num_experts, top_k=cfg.top_k * copies if together else cfg.top_k)
        grown = _gather(layer, ids, new)
        with torch.no_grad():
            _rescale(grown, _growth_factor(cfg, num_experts / layer.num_experts, together))
            _diverge(grown, layer.num_experts, noise, seed, exact=together)
            if grown.router.expert_bias is not None and softmax:
                grown.router.expert_bias /= num_experts / layer.num_experts  # as the gates it is compared with
        made[name] = grown
    return swap(model, made)


def _growth_factor(cfg: MoEConfig, copies: float, together: bool) -> float:
    """What outputs must be multiplied by: the gate an expert had, over the gates its chosen copies have together."""
    if cfg.router.normalize_gates and cfg.top_k > 1:
        return 1.0
    share = 1 / copies if cfg.router.score == "softmax" else 1.0
    return 1 / (share * (copies if together else 1))


def _rescale(layer: MoEMlp, factor: float) -> None:
    for name in ("fc2_weight", "fc2_bias"):
        parameter = getattr(layer.experts, name)
        if parameter is not None and factor != 1:
            parameter.mul_(factor)


def _diverge(layer: MoEMlp, first: int, noise: float, seed: int, *, exact: bool) -> None:
    """Let experts from `first` on differ from those they are copies of."""
    for expert in range(first, layer.num_experts):
        for axis_of, axis in [] if exact else router_axes(layer):
            if axis_of is not layer.router.expert_bias:
                row = axis_of.select(axis, expert)
                drawn = torch.randn(row.shape, generator=generator(seed, layer.name, "router", expert)).to(row)
                row += drawn * (TIE_BREAK * row.float().square().mean().sqrt()).to(row)
        for name, parameter in layer.experts.named_parameters():
            if noise and name.endswith("weight"):
                drawn = torch.randn(parameter[expert].shape, generator=generator(seed, layer.name, name, expert))
                parameter[expert] += drawn.to(parameter) * (noise * parameter[expert].std())


def expert_layers(model: nn.Module) -> dict[str, MoEMlp]:
    """The expert layers of a model by module name.

    Raises:
        ConfigError: it has none, or its experts are spread over processes.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoEMlp)}
    if not layers:
        raise ConfigError(f"this {type(model).__name__} has no experts to edit")
    if any(is_expert_parameter(p) for layer in layers.values() for p in layer.parameters()):
        raise ConfigError("the model's experts are spread over processes; edit them first and spread afterwards")
    return layers


def swap(model: Model, made: Mapping[str, nn.Module]) -> Model:
    """A copy of `model` with the modules of these names replaced; a `SwinTransformer`'s config says so."""
    memo = {id(model.get_submodule(name)): new for name, new in made.items()}
    copied = copy.deepcopy(model, memo)  # what is replaced is not copied
    layers = [module for module in made.values() if isinstance(module, MoEMlp)]
    if isinstance(copied, SwinTransformer) and layers:
        copied.config = replace(copied.config, moe=layers[0].cfg)
    return copied


def _gather(layer: MoEMlp, ids: Ids, cfg: MoEConfig) -> MoEMlp:
    """The layer with experts `ids` of the old one, with its mode and frozen parameters."""
    new = MoEMlp(cfg, dim=layer.dim, hidden_dim=layer.hidden_dim, name=layer.name, device="meta")
    index = torch.tensor(ids, device=next(layer.parameters()).device)
    state = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    by_expert: dict[int, int] = {id(tensor): axis for tensor, axis in router_axes(layer)}
    for name, tensor in layer.state_dict(keep_vars=True).items():
        axis = 0 if name.startswith("experts.") else by_expert.get(id(tensor))
        if axis is not None:
            state[name] = tensor.detach().index_select(axis, index)
    new.load_state_dict(state, assign=True)
    for name, parameter in layer.named_parameters():
        new.get_parameter(name).requires_grad_(parameter.requires_grad)
    new.router.name, new.router.seed, new.router.init_std = layer.name, layer.router.seed, layer.router.init_std
    new.seed_noise(layer._noise_seed)
    return new.train(layer.training)


def _check_ids(name: str, layer: MoEMlp, ids: Ids) -> None:
    wrong = [e for e in ids if not 0 <= e < layer.num_experts]
    if wrong or len(set(ids)) != len(ids):
        raise ConfigError(
            f"{name!r} has experts 0 to {layer.num_experts - 1}; {list(ids)} names "
            + (f"{wrong}, which it has not" if wrong else "some of them twice")
        )
    if len(ids) < layer.top_k:
        raise ConfigError(
            f"{name!r} visits {layer.top_k} experts per token, and {len(ids)} would be left; keep at least that many"
        )


def _check_equal(model: nn.Module, counts: Mapping[str, int]) -> None:
    if isinstance(model, SwinTransformer) and len(set(counts.values())) > 1:
        raise ConfigError(f"a SwinTransformer's layers have one number of experts, and would have {dict(counts)}")


def expert_tensors(layer: MoEMlp) -> dict[str, Tensor]:
    """The layer's stacked parameters by name, without gradients."""
    return {name: parameter.detach() for name, parameter in layer.experts.named_parameters()}
