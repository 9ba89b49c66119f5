"""Where Tutel is wrong or cannot go on, measured on an installed Tutel: plain numbers, kept in tests/data/tutel.json.

Shapes: T tokens, E experts, D width.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.numerics.tutel_cases import CASES, DIM, HIDDEN, NUM_EXPERTS, Case, live_layer, observe, shared_tensors

PLAIN = Case("linear", 1, 0.7, bpr=False, normalize=False, gshard=True, noise=0.0)
WIDE = 32
"""Experts and width of the layer in which the load loss is looked at: its logits are its inputs."""


def as_error(function: Callable[[], Any]) -> str:
    """`Type: first line` of what a call raises; empty if it raises nothing."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""


def capacities() -> list[list[float]]:
    """[T, E, k, factor, alignment, longest queue, Tutel's capacity] over a grid."""
    from tutel import moe

    rows = []
    gen = torch.Generator().manual_seed(0)
    grid = itertools.product((1, 4, 23, 64, 100), (5, 8), (1, 2, 3), (0.3, 1.0, 1.25, -0.3, -1.0, -1.25, 0.0), (1, 4))
    for tokens, experts, k, factor, alignment in grid:
        scores = torch.randn(tokens, experts, generator=gen).softmax(1)
        (_, ids, _, _, slots, _), _ = moe.top_k_routing(
            scores, k, loss_fn=None, capacity_factor=factor, alignment=alignment
        )
        rows.append([tokens, experts, k, factor, alignment, int(torch.bincount(torch.cat(ids)).max()), slots])
    return rows


def load_loss() -> dict[str, Tensor]:
    """Loss and gate gradient of the load and importance loss where logits have a standard deviation of 1."""
    from tutel import moe

    gen = torch.Generator().manual_seed(1)
    x = torch.randn(48, WIDE, generator=gen)
    layer = moe.moe_layer(
        gate_type={"type": "top", "k": 1, "fp32_gate": True, "capacity_factor": 1.25, "gate_noise": 1.0},
        model_dim=WIDE,
        experts={
            "type": "ffn",
            "num_experts_per_device": WIDE,
            "hidden_size_per_expert": 2,
            "activation_fn": torch.nn.functional.gelu,
        },
        is_gshard_loss=False,
    )
    with torch.no_grad():
        layer.gates[0].wg.weight.copy_(torch.eye(WIDE))
    torch.manual_seed(2)
    l_aux = layer(x).l_aux
    torch.manual_seed(2)
    noise = torch.randn(48, WIDE) / WIDE
    (grad,) = torch.autograd.grad(l_aux, layer.gates[0].wg.weight)
    return {"x": x, "noise": noise, "l_aux": l_aux.detach().reshape(()), "grad": grad}


def doubles() -> Tensor:
    """(T, D) float64 outputs of a layer turned to double precision."""
    shared = shared_tensors()
    layer = live_layer(replace(PLAIN, k=2, factor=0.0), shared).double()
    y: Tensor = layer(shared["x"].double()).detach()
    return y


def findings() -> dict[str, Any]:
    """Numbers and messages by name."""
    from tutel import moe

    shared = shared_tensors()
    miscounts = {}
    for case in CASES:
        if case.miscounted:
            seen = observe(live_layer(case, shared), case, shared)
            queues = torch.bincount(seen["experts"].long().flatten(), minlength=NUM_EXPERTS)
            dropped = (queues - int(seen["slots"])).clamp(min=0)
            miscounts[case.name] = {
                "slots": int(seen["slots"]),
                "longest_queue": int(queues.max()),
                "choices_dropped": int(dropped.sum()),
                "dispatch_count": seen["counts"].tolist(),
                "routed": queues.tolist(),
            }
    used = live_layer(PLAIN, shared)
    used(shared["x"])
    narrow = live_layer(PLAIN, shared).half()
    narrow.gates[0].fp32_gate = False
    empty = live_layer(PLAIN, shared)
    gate_only = {k: v for k, v in empty.state_dict().items() if not k.startswith("experts.")}
    empty.load_state_dict(gate_only, strict=True)
    per_call = live_layer(PLAIN, shared)(shared["x"], capacity_factor=0)
    gate = {"type": "top", "k": 1, "capacity_factor": 0.5}
    experts = {"type": "ffn", "num_experts_per_device": 8, "hidden_size_per_expert": HIDDEN, "activation_fn": nn.GELU()}
    return {
        "miscounted_longest_queue": miscounts,
        "tokens_dropped_at_per_call_capacity_factor_0": int((per_call == 0).all(-1).sum()),
        "strict_load_without_experts_fills_zeros": not any(p.any() for p in empty.experts.parameters()),
        "errors": {
            "copy_after_forward": as_error(lambda: copy.deepcopy(used)),
            "no_tokens": as_error(lambda: used(torch.empty(0, DIM))),
            "no_slots": as_error(lambda: moe.moe_layer(gate, DIM, experts)(torch.randn(4, DIM))),
            "default_activation": as_error(
                lambda: live_layer(
                    PLAIN,
                    shared,
                    experts={"type": "ffn", "num_experts_per_device": NUM_EXPERTS, "hidden_size_per_expert": HIDDEN},
                )(shared["x"])
            ),
            "half_precision_on_cpu": as_error(lambda: narrow(shared["x"].half())),
            "dict_used_twice": as_error(lambda: moe.moe_layer(gate, DIM, experts)),
        },
    }
