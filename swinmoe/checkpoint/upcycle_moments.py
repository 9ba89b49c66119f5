"""Optimiser moments of a dense model, carried over to the experts cut from it.

Shapes: E experts, K choices per token, G parts of an MLP, s sum of a token's gates (`upcycle_plan`).

Moments follow gradients, and an expert's gradient is not its parent's: it sees K/E of the tokens, each with a gate of
s/K, and its fc2 is G/s times the parent's. In expectation the gradient of its fc2 and b2 is s/E times the parent's, and
that of fc1 and b1 G/E times. First moments are multiplied by that, second ones by its square, so that Adam's steps keep
their size. What has no parent, routers and units drawn anew, starts from zero first moments.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from swinmoe.checkpoint.naming import to_model
from swinmoe.checkpoint.upcycle import (
    DenseMlp,
    Upcycling,
    check_parent,
    cut,
    fresh_units,
    hidden_units,
    routed_share,
    rows_of,
)
from swinmoe.errors import CheckpointError
from swinmoe.models import SwinTransformer
from swinmoe.moe import MoEMlp

_POWER = {"exp_avg": 1, "exp_avg_sq": 2}
"""AdamW's states, and the power of the gradient that they follow."""


def upcycle_moments(
    moments: Mapping[str, Tensor], sparse: SwinTransformer, how: Upcycling | None = None
) -> dict[str, Tensor]:
    """AdamW's state of a dense model -> of the sparse one that `upcycle` made of it.

    Args:
        moments: `PARAMETER#exp_avg`, `PARAMETER#exp_avg_sq`, `PARAMETER#step`, as checkpoints name them.
        sparse: the upcycled model, before anything else is done to it.
        how: what `upcycle` was given.

    Returns:
        The same for every trained parameter of `sparse`.

    Raises:
        CheckpointError: a parameter of the dense model has no moments, or moments of another shape.
    """
    how, layers = how or Upcycling(), sparse.moe_layers()
    parameters = {name: p for name, p in sparse.named_parameters() if p.requires_grad}
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for key, power in _POWER.items():
            found |= {f"{name}.{part}#{key}": v for part, v in _of_layer(layer, name, moments, key, power, how).items()}
        step = _one(moments, f"{name}.fc1.weight#step")
        found |= {
            f"{n}#step": step.clone() for n in parameters if n.startswith((f"{name}.experts.", f"{name}.shared."))
        }
    for name, parameter in parameters.items():
        if f"{name}#step" in found:
            continue
        if any(name.startswith(f"{layer}.router.") for layer in layers):
            found |= {f"{name}#{key}": torch.zeros_like(parameter.detach()) for key in _POWER}
            found[f"{name}#step"] = torch.zeros(())
        else:
            found |= {f"{name}#{key}": _one(moments, f"{name}#{key}") for key in (*_POWER, "step")}
    for name, parameter in parameters.items():
        if found[f"{name}#exp_avg"].shape != parameter.shape:
            raise CheckpointError(
                f"the moments of {name!r} are {tuple(found[f'{name}#exp_avg'].shape)} and the parameter is "
                f"{tuple(parameter.shape)}; moments are carried between models of the same sizes only, so reset them"
            )
    return {f"{name}#{key}": found[f"{name}#{key}"] for name in parameters for key in (*_POWER, "step")}


def load_moments(optimizer: Optimizer, model: nn.Module, moments: Mapping[str, Tensor]) -> None:
    """Give an optimiser over `model`'s parameters the state `moments`, named as `upcycle_moments` or as files do.

    Raises:
        CheckpointError: a parameter of the optimiser has none.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    keys = {name.partition("#")[2] for name in moments}
    moments = {
        f"{name}#{key}": value
        for key in keys
        for name, value in to_model(
            {n.partition("#")[0]: v for n, v in moments.items() if n.endswith(f"#{key}")}
        ).items()
    }
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = {key: _one(moments, f"{names[parameter]}#{key}").clone() for key in (*_POWER, "step")}
            # Steps are counted where torch counts them: on the device where the optimiser is fused, else on the host.
            step = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
            optimizer.state[parameter] = {
                key: value.to(step, torch.float32) if key == "step" else value.to(parameter)
                for key, value in state.items()
            }


def _of_layer(
    layer: MoEMlp, name: str, moments: Mapping[str, Tensor], key: str, power: int, how: Upcycling
) -> dict[str, Tensor]:
    parent = DenseMlp.of(moments, name, f"#{key}")
    plan = check_parent(layer, parent, how, name, moments=True)
    units, share = hidden_units(layer, plan, how), routed_share(plan, layer)
    one, experts = torch.ones_like(share), layer.num_experts
    fc2 = (plan.gate_sum / experts) ** power
    own = cut(parent, units, (share * plan.parts / experts) ** power, one * fc2, fc2)
    if key == "exp_avg" and how.drop:
        rows = layer.experts.activation.rows_per_hidden
        for expert in range(experts):
            fresh = fresh_units(layer, expert, units.shape[1], how)
            for part, axis in (("fc1_weight", 0), ("fc1_bias", 0), ("fc2_weight", 1)):
                if part in own:
                    own[part][expert].index_fill_(axis, fresh if axis else rows_of(fresh, rows), 0)
    found = {f"experts.{part}": value for part, value in own.items() if hasattr(layer.experts, part)}
    if layer.shared is not None:
        everyone = torch.arange(layer.shared.fc2_weight.shape[2]).unsqueeze(0)
        both = cut(parent, everyone, (one * plan.shared_share) ** power, one, 1.0)
        found |= {f"shared.{part}": value for part, value in both.items()}
    return {part: value.contiguous() for part, value in found.items()}


def _one(moments: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in moments:
        raise CheckpointError(
            f"the dense model's optimiser has no {name!r}; moments are carried from AdamW that has trained "
            "all parameters: reset them instead"
        )
    return moments[name]
