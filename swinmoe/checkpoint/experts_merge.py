"""Sparse -> dense: the experts of each layer averaged into the MLP they could have stayed.

Shapes: E experts, F hidden units of the dense MLP, w of an expert, G parts that an MLP is cut into, V = E/G groups.

Weights are averaged, not functions (as in model soups, Wortsman et al. 2022), so that it works as far as experts are
still alike. A dense MLP has no gate: the part of it that experts e compute is multiplied by the mean of the gates that
tokens gave to those experts, taken together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from swinmoe.checkpoint.experts_edit import Model, expert_layers, expert_tensors, swap
from swinmoe.checkpoint.sparsify import SparseMlp
from swinmoe.checkpoint.upcycle import DenseMlp
from swinmoe.checkpoint.upcycle_plan import ExpertPlan, nominal_gate_sum, plan_experts
from swinmoe.checkpoint.usage import ExpertUsage, usage_of
from swinmoe.errors import ConfigError
from swinmoe.models import SwinTransformer, build_model
from swinmoe.moe import MoEMlp

How = Literal["average", "usage"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


def merge_experts(model: Model, how: How = "average", usage: Mapping[str, ExpertUsage] | None = None) -> Model:
    """A dense model: each expert layer becomes one MLP.

    Args:
        model: a `SwinTransformer` (gives its dense twin), or a model that `sparsify` has changed.
        how: `average` counts experts alike; `usage` by the gates that data gave them.
        usage: of this model; needed for `usage`, and wherever a token's gates do not add up to a known number.

    Raises:
        ConfigError: the layer is no set of cuts of one MLP, gates are not known, or the dense model has no place for
            what experts compute.
        RoutingError: `usage` is not this model's.
    """
    layers = expert_layers(model)
    merged = {name: merge_layer(layer, how, usage, name) for name, layer in layers.items()}
    if isinstance(model, SwinTransformer):
        return _dense_twin(model, layers, merged)  # type: ignore[return-value]  # a SwinTransformer, as was given
    made: dict[str, nn.Module] = {}
    for name, mlp in merged.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(parent, SparseMlp):
            raise ConfigError(f"{name!r} stands in a {type(parent).__name__} that expects statistics; only what "
                              "sparsify made can be made dense again")  # fmt: skip
        made[name.rpartition(".")[0]] = _plain_mlp(mlp, layers[name], parent)
    return swap(model, made)


@torch.no_grad()
def merge_layer(layer: MoEMlp, how: How, usage: Mapping[str, ExpertUsage] | None, name: str) -> DenseMlp:
    """One MLP from the experts of a layer; see `merge_experts`."""
    plan = _plan(layer)
    if layer.num_experts % plan.parts:
        raise ConfigError(f"{name!r}: {layer.num_experts} experts are no whole number of MLPs of {plan.parts} parts")
    weights, totals = _weights(layer, plan, how, None if usage is None else usage_of(usage, name), name)
    own = expert_tensors(layer)
    rows = layer.experts.activation.rows_per_hidden

    def mean(stack: Tensor) -> Tensor:  # (E, ...) -> (G, ...)
        by_part = stack.unflatten(0, (-1, plan.parts))
        return torch.einsum("vg...,vg->g...", by_part, weights.to(stack))

    scale = totals.to(own["fc2_weight"])
    fc1 = mean(own["fc1_weight"]).flatten(0, 1)
    b1 = mean(own["fc1_bias"]).flatten() if "fc1_bias" in own else None
    fc2 = (mean(own["fc2_weight"]) * scale.view(-1, 1, 1)).movedim(0, 1).flatten(1)
    b2 = (mean(own["fc2_bias"]) * scale.view(-1, 1)).sum(0) if "fc2_bias" in own else None
    merged = DenseMlp(fc1, b1, fc2, b2)
    return merged if layer.shared is None else _with_shared(merged, layer.shared, plan, rows)


def _plan(layer: MoEMlp) -> ExpertPlan:
    """Of what parts an MLP was, as `upcycle` would have cut it."""
    try:
        return plan_experts(layer.cfg, layer.hidden_dim)
    except ConfigError:
        return plan_experts(layer.cfg, layer.hidden_dim, preserve=False)


def _weights(layer: MoEMlp, plan: ExpertPlan, how: How, usage: ExpertUsage | None, name: str) -> tuple[Tensor, Tensor]:
    """(V, G) weight of each expert within its part, and (G,) what a token's gates of a part add up to."""
    groups = layer.num_experts // plan.parts
    even = torch.full((groups, plan.parts), 1 / groups, dtype=torch.float64)
    if usage is None:
        gate_sum, uncertain = nominal_gate_sum(layer.cfg)
        if how == "usage" or uncertain:
            why = "how='usage'" if how == "usage" else "gates that are not normalised (their sum differs by token)"
            raise ConfigError(
                f"merging {name!r} with {why} needs the experts' usage, measured on data (--data CONFIG, any with such "
                "images)"
            )
        return even, torch.full((plan.parts,), gate_sum / plan.parts, dtype=torch.float64)
    gates = usage.gates.view(groups, plan.parts)
    totals = gates.sum(0)
    if how == "usage":
        even = torch.where(totals > 0, gates / totals.clamp(min=torch.finfo(totals.dtype).tiny), even)
    return even, totals / usage.tokens


def _with_shared(merged: DenseMlp, shared: nn.Module, plan: ExpertPlan, rows: int) -> DenseMlp:
    """The shared expert's units stand before the others' (`first`), or are the first of theirs and join them."""
    own = {name: parameter.detach().squeeze(0) for name, parameter in shared.named_parameters()}
    width = own["fc2_weight"].shape[1]
    b1, b2 = own.get("fc1_bias"), own.get("fc2_bias")
    bias = merged.b2 if b2 is None or merged.b2 is None else merged.b2 + b2
    if plan.first:
        first = None if b1 is None or merged.b1 is None else torch.cat((b1, merged.b1))
        fc1 = torch.cat((own["fc1_weight"], merged.fc1))
        return DenseMlp(fc1, first, torch.cat((own["fc2_weight"], merged.fc2), 1), bias)
    fc1, fc2, first = merged.fc1.clone(), merged.fc2.clone(), None if merged.b1 is None else merged.b1.clone()
    fc1[: width * rows] = (fc1[: width * rows] + own["fc1_weight"]) / 2
    fc2[:, :width] += own["fc2_weight"]
    if first is not None and b1 is not None:
        first[: width * rows] = (first[: width * rows] + b1) / 2
    return DenseMlp(fc1, first, fc2, bias)


def _dense_twin(
    model: SwinTransformer, layers: Mapping[str, MoEMlp], merged: Mapping[str, DenseMlp]
) -> SwinTransformer:
    wrong = {layer.cfg.experts.type for layer in layers.values()} - {"gelu"}
    if wrong:
        raise ConfigError(
            f"a dense Swin's MLPs are of type 'gelu' and these experts are {sorted(wrong)}; leave it sparse"
        )
    biased = model.config.mlp_fc2_bias or any(_is_something(mlp.b2) for mlp in merged.values())
    cfg = replace(model.config, moe=None, mlp_fc2_bias=biased)
    device = model.norm.weight.device
    dense = build_model(cfg, seed=model.seed, device=device, dtype=model.norm.weight.dtype)
    source = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.rpartition(".mlp.")[0] + ".mlp" not in layers
    }
    for name, mlp in merged.items():
        source |= {
            f"{name}.{key}": value
            for key, value in (
                ("fc1.weight", mlp.fc1),
                ("fc1.bias", mlp.b1),
                ("fc2.weight", mlp.fc2),
                ("fc2.bias", mlp.b2),
            )
            if value is not None
        }
    state = dense.state_dict()
    for name, tensor in state.items():
        # What neither experts nor dense MLPs had is a bias, and 0.
        with torch.no_grad():
            tensor.copy_(source[name]) if name in source else tensor.zero_()
    return dense.train(model.training)


def _is_something(bias: Tensor | None) -> bool:
    return bias is not None and bool(bias.any())


def _plain_mlp(mlp: DenseMlp, layer: MoEMlp, around: SparseMlp) -> nn.Module:
    """Named as timm names the parts of an MLP."""
    kind = layer.cfg.experts.type
    if kind not in _ACTIVATIONS:
        raise ConfigError(f"experts of type {kind!r} cannot be made dense again; use one of {sorted(_ACTIVATIONS)}")
    made = []
    for weight, bias in ((mlp.fc1, mlp.b1), (mlp.fc2, mlp.b2)):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        if bias is not None:
            linear.bias = nn.Parameter(bias)
        made.append(linear)
    parts = OrderedDict(
        fc1=made[0],
        act=_ACTIVATIONS[kind](),
        drop1=nn.Dropout(layer.cfg.experts.dropout),
        fc2=made[1],
        drop2=nn.Dropout(around.drop.p),
    )
    return nn.Sequential(parts).train(around.training)
