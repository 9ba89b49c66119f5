"""A live `tutel.moe.moe_layer` -> `MoEMlp` with the same weights, outputs and gradients.

Shapes: E experts, D width, F hidden width of one expert, P projection width of the cosine gate.

The layer is read by its attributes, so Tutel itself is not imported here. What each of its arguments becomes, and what
we do not have, is in docs/howto/from-tutel.md.
"""

from __future__ import annotations

import inspect
from functools import partial
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from swinmoe.config.moe import (
    BalanceLossConfig,
    CapacityConfig,
    CapacityPolicy,
    ExpertConfig,
    MoEConfig,
    RouterConfig,
)
from swinmoe.errors import CheckpointError
from swinmoe.moe.activations import Activation, Gelu, Relu
from swinmoe.moe.layer import MoEMlp

_GATES = {"tutel.gates.top": "linear", "tutel.gates.cosine_top": "cosine"}
_EXPERTS = {"tutel.experts.ffn": "ffn", "tutel.experts.llama_ffn": "llama_ffn"}
_KNOWN: dict[str, Activation] = {"gelu": Gelu(), "relu": Relu()}


def from_tutel(
    layer: nn.Module,
    *,
    activation: str | None = None,
    dropout: float = 0.0,
    loss_weight: float = 1.0,
    dispatcher: str = "ragged",
    name: str = "moe",
) -> MoEMlp:
    """Convert a Tutel layer that holds all of its experts.

    Args:
        layer: an instance of `tutel.moe.moe_layer`. It is left as it is; the new layer has copies of its weights.
        activation: type of the experts (`gelu`, `relu`, or a registered name whose experts have the same weights);
            None = found out by calling the layer's own activation on a few numbers, in training mode: one that drops
            is refused, in evaluation too, until both are said.
        dropout: inside the experts after the activation, where `activation_fn` does it in Tutel; then say `activation`.
        loss_weight: of the balance loss; with 1 `stats.loss` is Tutel's `l_aux`.
        dispatcher: of the new layer; all give the same numbers.
        name: of the new layer, from which its gate noise is seeded.

    Returns:
        A layer on the same device, in the same dtypes and mode, with the same parameters frozen. `y, stats = new(x)`.

    Raises:
        CheckpointError: the layer has, by name, what swinmoe does not, or holds a share of its experts only.
    """
    source: Any = layer
    _refuse_what_we_lack(source)
    gate = source.gates[0]
    kind = _kind(gate, _GATES, "gate")
    weights, frozen, experts = _read_experts(source.experts, activation, dropout)
    width = weights["experts.fc1_weight"].dtype
    weights |= _read_gate(gate, kind, frozen)
    gate_dtype = weights["router.weight" if kind == "linear" else "router.projector.weight"].dtype
    policy = _capacity(float(gate.capacity_factor), source.a2a_ffn_overlap_degree)
    cfg = MoEConfig(
        num_experts=int(source.num_global_experts),
        top_k=int(gate.top_k),
        router=RouterConfig(
            type=kind,
            normalize_gates=bool(source.normalize_gate),
            noise=float(gate.gate_noise),
            batch_prioritized=bool(source.batch_prioritized_routing),
            # A wide gate behaves the same either way; a narrow one computes in its own dtype unless told to widen.
            fp32=bool(gate.fp32_gate) or gate_dtype not in (torch.float16, torch.bfloat16),
            proj_dim=weights["router.sim_matrix"].shape[0] if kind == "cosine" else 256,
        ),
        capacity=CapacityConfig(train=policy, eval=policy),
        losses=_losses(bool(source.is_gshard_loss), loss_weight),
        experts=experts,
        dispatcher=dispatcher,
    )
    _, dim, hidden = weights["experts.fc2_weight"].shape
    new = MoEMlp(cfg, dim=dim, hidden_dim=hidden, name=name, device=weights["experts.fc1_weight"].device, dtype=width)
    new.router.to(dtype=gate_dtype)
    new.load_state_dict(weights, strict=True)
    for parameter_name, parameter in new.named_parameters():
        parameter.requires_grad_(parameter_name not in frozen)
    return new.train(layer.training)


def _refuse_what_we_lack(source: Any) -> None:
    missing = [name for name in ("gates", "experts", "num_global_experts", "is_postscore") if not hasattr(source, name)]
    if missing:
        raise CheckpointError(
            f"from_tutel was given a {type(source).__name__} without {missing}; give it a tutel.moe.moe_layer itself "
            "(in Swin-MoE: block.mlp._moe_layer), not a state dict or a module around it"
        )
    held, total = int(source.num_local_experts), int(source.num_global_experts)
    if int(source.sharded_count) > 1:
        raise CheckpointError(
            f"this rank holds 1/{source.sharded_count} of one of {total} experts, and from_tutel needs whole ones; "
            "save every rank's state dict, join them with `python -m tutel.checkpoint.gather`, load the result into a "
            "layer built with num_experts_per_device equal to all experts on one process, and convert that"
        )
    if held != total:
        raise CheckpointError(
            f"this rank holds {held} of {total} experts, and from_tutel needs all; save every rank's state dict, join "
            "them with `python -m tutel.checkpoint.gather`, load the result into a layer built with "
            f"num_experts_per_device={total} on one process, and convert that"
        )
    if len(source.gates) != 1:
        raise CheckpointError(
            f"gate_type is a list of {len(source.gates)} gates and swinmoe's layers have one; set layer.gates to a "
            "ModuleList of the gate to keep, and convert once for each"
        )
    if not source.is_postscore:
        raise CheckpointError(
            "is_postscore=False weights the inputs of experts; swinmoe weights their outputs (is_postscore=True) only, "
            "as GShard and Swin-MoE do; such a layer cannot be converted"
        )
    if source.result_func is not None:
        raise CheckpointError(
            "result_func is code of yours that swinmoe cannot see into; set layer.result_func = None, convert, and "
            "apply it to the (y, stats) that the new layer returns"
        )
    if source.skip_moe:
        raise CheckpointError("the layer was built with SKIP_MOE=1 and passes its input on; build it without")


def _kind(part: nn.Module, known: dict[str, str], what: str) -> str:
    home = type(part).__module__
    if home not in known:
        raise CheckpointError(
            f"custom {what} {home}.{type(part).__qualname__}: from_tutel knows Tutel's own {sorted(known.values())}; "
            f"write yours with register_{'router' if what == 'gate' else 'expert'} (docs/howto/extend.md) and copy its "
            "weights"
        )
    return known[home]


def _read_gate(gate: Any, kind: str, frozen: set[str]) -> dict[str, Tensor]:
    if kind == "linear":
        found = {"weight": gate.wg.weight}
    else:
        found = {
            "projector.weight": gate.cosine_projector.weight,
            "projector.bias": gate.cosine_projector.bias,
            "sim_matrix": gate.sim_matrix,
            "temperature": gate.temperature,
        }
    frozen.update(f"router.{name}" for name, value in found.items() if not value.requires_grad)
    return {f"router.{name}": value.detach() for name, value in found.items()}


def _read_experts(
    experts: Any, activation: str | None, dropout: float
) -> tuple[dict[str, Tensor], set[str], ExpertConfig]:
    """Our names -> weights; the names of frozen ones; the configuration."""
    kind = _kind(experts, _EXPERTS, "experts")
    if kind == "llama_ffn":
        return _read_llama(experts, activation, dropout)
    fc1, b1, b2 = experts.batched_fc1_w, experts.batched_fc1_bias, experts.batched_fc2_bias
    fc2 = experts.batched_fc2_w  # (E, F, D), applied from the right
    if fc2.shape[2] != fc1.shape[2]:
        raise CheckpointError(
            f"output_dim={fc2.shape[2]} differs from model_dim={fc1.shape[2]}; swinmoe's experts keep the width of "
            "tokens, so put a linear layer behind and let experts have output_dim=None"
        )
    weights = {"experts.fc1_weight": fc1, "experts.fc2_weight": fc2.transpose(1, 2)}
    if b1 is not None:
        weights["experts.fc1_bias"] = b1
    if b2 is not None:
        weights["experts.fc2_bias"] = b2
    frozen = {
        ours for ours, theirs in weights.items() if not (fc2 if ours == "experts.fc2_weight" else theirs).requires_grad
    }
    second: Literal["learned", "frozen-zero", "none"] = "learned"
    if b2 is None:
        second = "none"
    elif not b2.requires_grad and not b2.any():
        second = "frozen-zero"
    cfg = ExpertConfig(
        type=activation or _recognise(experts.activation_fn, fc1),
        dropout=dropout,
        fc1_bias=b1 is not None,
        fc2_bias=second,
    )
    return {name: value.detach() for name, value in weights.items()}, frozen, cfg


def _read_llama(
    experts: Any, activation: str | None, dropout: float
) -> tuple[dict[str, Tensor], set[str], ExpertConfig]:
    """fc3(SiLU(x·fc1)·(x·fc2)) is our `swiglu` with fc2 as value and fc1 as gate."""
    stacks = [experts.W_fc1, experts.W_fc2, experts.W_fc3]
    shapes = [experts.W_fc1_full_shape, experts.W_fc2_full_shape, experts.W_fc3_full_shape]
    if activation is None:
        probe = _probe(stacks[0])
        if not torch.allclose(experts.activation_fn(probe), nn.functional.silu(probe), atol=1e-6):
            raise CheckpointError(
                "llama_ffn experts with an activation_fn that is not SiLU: swinmoe's `swiglu` is SiLU's; register "
                "experts of your own (docs/howto/extend.md) and copy their weights"
            )
    gate, value, out = (w.detach().view(shape).transpose(1, 2) for w, shape in zip(stacks, shapes, strict=True))
    weights = {
        "experts.fc1_weight": torch.stack((value, gate), dim=2).flatten(1, 2),  # rows 2i, 2i + 1 of hidden unit i
        "experts.fc2_weight": out,
    }
    if stacks[0].requires_grad != stacks[1].requires_grad:
        raise CheckpointError("one of W_fc1 and W_fc2 is frozen; ours are one parameter: freeze both or none")
    frozen = {n for n, w in zip(weights, (stacks[0], stacks[2]), strict=True) if not w.requires_grad}
    cfg = ExpertConfig(type=activation or "swiglu", dropout=dropout, fc1_bias=False, fc2_bias="none")
    return weights, frozen, cfg


def _probe(like: Tensor) -> Tensor:
    return torch.linspace(-6, 6, 98, device=like.device).view(1, 2, 49)  # (experts, rows, hidden)


def _recognise(function: Any, like: Tensor) -> str:
    """The name of an activation by its values, since most are anonymous functions."""
    probe = _probe(like)
    parts = _modules_in(function)
    before = [(part, part.training) for part in parts]
    say = "; say which it is: from_tutel(layer, activation='gelu'), with dropout=... if it drops"
    with torch.no_grad(), torch.random.fork_rng(devices=[probe.device] if probe.is_cuda else []):
        try:
            # A dropout that evaluation has switched off is there all the same, and the new layer may be trained.
            for part in parts:
                part.training = True
            first, second = function(probe), function(probe)
        except Exception as error:
            raise CheckpointError(f"the experts' activation_fn cannot be called ({error!r}){say}") from error
        finally:
            for part, training in before:
                part.training = training
    if not torch.equal(first, second):
        raise CheckpointError(f"the experts' activation_fn is random in training{say}")
    for name, known in _KNOWN.items():
        if first.shape == probe.shape and torch.allclose(first.to(probe.dtype), known.value(probe), atol=1e-6):
            return name
    raise CheckpointError(
        f"the experts' activation_fn is none of {sorted(_KNOWN)}; register experts with it (docs/howto/extend.md) and "
        "say their name: from_tutel(layer, activation='...')"
    )


def _modules_in(function: Any, depth: int = 4) -> list[nn.Module]:
    """The modules that a callable reaches, itself or through others: what it is, is bound to, closes over or names."""
    if isinstance(function, nn.Module):
        return list(function.modules())
    if depth == 0:
        return []
    reached = [getattr(function, "__self__", None), getattr(function, "__func__", None)]
    if isinstance(function, partial):
        reached += [function.func, *function.args, *function.keywords.values()]
    if isinstance(function, FunctionType):
        around = inspect.getclosurevars(function)
        reached += [*(function.__defaults__ or ()), *around.nonlocals.values(), *around.globals.values()]
    inside = (_modules_in(part, depth - 1) for part in reached if callable(part))
    return list(dict.fromkeys(module for modules in inside for module in modules))


def _capacity(factor: float, overlap_degree: int) -> CapacityPolicy:
    """The sign of Tutel's factor picks a policy."""
    if factor == 0:
        return CapacityPolicy(kind="dropless")
    if overlap_degree > 1:
        raise CheckpointError(
            f"a2a_ffn_overlap_degree={overlap_degree} makes Tutel round the capacity up to a multiple of it, which "
            "changes who is dropped; swinmoe's chunks do not. Set layer.a2a_ffn_overlap_degree = 1 to go without"
        )
    return CapacityPolicy(kind="fixed" if factor > 0 else "bounded", factor=abs(factor))


def _losses(gshard: bool, weight: float) -> BalanceLossConfig:
    # Tutel balances each rank's batch by itself.
    if gshard:
        return BalanceLossConfig(gshard=weight, batch="local")
    return BalanceLossConfig(importance_load_tutel=weight, batch="local")
