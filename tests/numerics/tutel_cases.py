"""The cases in which our layer is held to Tutel's `moe_layer`, and how each side is observed and compared.

Shapes: T tokens, E experts, D width, F hidden width, P projection width of the cosine gate, K choices.

`live_layer` and `observe` need Tutel; the rest does not: `stand_in` has a Tutel layer's attributes and no code.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinmoe.config import CapacityConfig, CapacityPolicy
from swinmoe.moe import MoEMlp
from swinmoe.moe.capacity import capacity

NUM_TOKENS, NUM_EXPERTS, DIM, HIDDEN, PROJ = 23, 5, 6, 7, 4
NOISE_SEED = 7
ATOL, RTOL = 2e-6, 1e-5


@dataclass(frozen=True)
class Case:
    """One setting of Tutel's layer."""

    gate: str
    k: int
    factor: float
    bpr: bool
    normalize: bool
    gshard: bool
    noise: float

    @property
    def name(self) -> str:
        flags = [w for w, on in (("bpr", self.bpr), ("norm", self.normalize), ("gshard", self.gshard)) if on]
        return "-".join([self.gate, f"k{self.k}", f"f{self.factor:g}", f"noise{self.noise:g}", *flags])

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def miscounted(self) -> bool:
        """Where tokens are prioritised Tutel reads the longest queue off a row that is not the queue's last."""
        return self.bpr and self.factor <= 0


def _cases() -> list[Case]:
    """Every gate, k, sign of the factor, priority and normalisation; loss and noise by chance."""
    chance = random.Random(0)
    cases = []
    for gate, k, factor, bpr, normalize in itertools.product(
        ("linear", "cosine"), (1, 2, 3), (0.7, 0.0, -0.7), (False, True), (False, True)
    ):
        if k == 1 and normalize and factor != 0.7:
            continue  # with one choice nothing is normalised: shown once for each gate and priority
        gshard = chance.random() < 0.5
        cases.append(Case(gate, k, factor, bpr, normalize, gshard, chance.choice((0.0, 1.0)) if gshard else 1.0))
    return cases


CASES = _cases()


def shared_tensors() -> dict[str, Tensor]:
    """Tokens, noise, weights and the direction of the loss, the same in all cases."""
    gen = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    tensors = {
        "x": draw(NUM_TOKENS, DIM),
        "direction": draw(NUM_TOKENS, DIM),
        "linear.wg.weight": draw(NUM_EXPERTS, DIM) / 2,
        "cosine.cosine_projector.weight": draw(PROJ, DIM) / 2,
        "cosine.cosine_projector.bias": draw(PROJ) / 2,
        "cosine.sim_matrix": draw(PROJ, NUM_EXPERTS),
        "cosine.temperature": torch.log(torch.tensor([2.0])),
        "experts.batched_fc1_w": draw(NUM_EXPERTS, HIDDEN, DIM) / 2,
        "experts.batched_fc1_bias": draw(NUM_EXPERTS, HIDDEN) / 2,
        "experts.batched_fc2_w": draw(NUM_EXPERTS, HIDDEN, DIM) / 2,
        "experts.batched_fc2_bias": draw(NUM_EXPERTS, DIM) / 2,
    }
    state = torch.random.get_rng_state()
    torch.manual_seed(NOISE_SEED)  # Tutel draws from the global generator
    tensors["unit_noise"] = torch.randn(NUM_TOKENS, NUM_EXPERTS)
    torch.random.set_rng_state(state)
    return tensors


def weights_of(case: Case, shared: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tutel's names, without the prefix of the gate's kind."""
    own = {f"gates.0.{k.partition('.')[2]}": v for k, v in shared.items() if k.startswith(f"{case.gate}.")}
    return own | {k: v for k, v in shared.items() if k.startswith("experts.")}


# ------------------------------------------------------------------------------------------------------ Tutel's side


def live_layer(case: Case, shared: dict[str, Tensor], **changes: Any) -> Any:
    """A Tutel layer with the shared weights; needs Tutel."""
    from tutel import moe

    gate: dict[str, Any] = {"type": "top" if case.gate == "linear" else "cosine_top", "k": case.k, "fp32_gate": True}
    gate |= {"capacity_factor": case.factor, "gate_noise": case.noise}
    if case.gate == "cosine":
        gate["proj_dim"] = PROJ
    arguments: dict[str, Any] = {
        "gate_type": gate,
        "model_dim": DIM,
        "experts": {
            "type": "ffn",
            "num_experts_per_device": NUM_EXPERTS,
            "hidden_size_per_expert": HIDDEN,
            "activation_fn": lambda x: F.gelu(x),
        },
        "batch_prioritized_routing": case.bpr,
        "normalize_gate": case.normalize,
        "is_gshard_loss": case.gshard,
    }
    layer = moe.moe_layer(**(arguments | changes))
    with torch.no_grad():
        for name, value in weights_of(case, shared).items():
            layer.get_parameter(name).copy_(value)
    return layer


def observe(layer: Any, case: Case, shared: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, loss, gradients, choices, places, gates and capacity of a Tutel layer; needs Tutel."""
    from tutel import moe

    x = shared["x"].clone().requires_grad_()
    torch.manual_seed(NOISE_SEED)
    y = layer(x)
    ((y * shared["direction"]).sum() + y.l_aux).backward()
    noise = shared["unit_noise"] * case.noise / NUM_EXPERTS
    with torch.no_grad():
        scores = (layer.gates[0](shared["x"]) + noise).softmax(dim=1)
        (_, experts, places, gates, slots, counts), _ = moe.top_k_routing(
            scores,
            case.k,
            loss_fn=None,
            capacity_factor=case.factor,
            batch_prioritized_routing=case.bpr,
            normalize_gate=case.normalize,
        )
    return {
        "y": y.detach(),
        "l_aux": y.l_aux.detach().reshape(()),
        "grad.x": x.grad,
        **{f"grad.{name}": p.grad for name, p in layer.named_parameters()},
        "experts": torch.stack(list(experts), 1).to(torch.int16),
        "places": torch.stack(list(places), 1).to(torch.int16),
        "gates": torch.stack(list(gates), 1),
        "slots": torch.tensor(slots, dtype=torch.int16),
        "counts": counts.to(torch.int16),
    }


# --------------------------------------------------------------------------------------------------------- our side


class LinearTopKGate(nn.Module):
    __module__ = "tutel.gates.top"


class CosineTopKGate(nn.Module):
    __module__ = "tutel.gates.cosine_top"


class FusedExpertsNetwork(nn.Module):
    __module__ = "tutel.experts.ffn"


class StandIn(nn.Module):
    """What `from_tutel` reads of a Tutel layer."""

    num_local_experts = num_global_experts = NUM_EXPERTS
    sharded_count = a2a_ffn_overlap_degree = 1
    is_postscore, skip_moe, result_func = True, False, None


def stand_in(case: Case, shared: dict[str, Tensor]) -> Any:
    """A Tutel layer's attributes, without Tutel."""
    layer: Any = StandIn()
    layer.batch_prioritized_routing, layer.normalize_gate = case.bpr, case.normalize
    layer.is_gshard_loss = case.gshard
    gate: Any = LinearTopKGate() if case.gate == "linear" else CosineTopKGate()
    gate.top_k, gate.capacity_factor, gate.gate_noise, gate.fp32_gate = case.k, case.factor, case.noise, True
    experts: Any = FusedExpertsNetwork()
    experts.activation_fn = lambda x: F.gelu(x)
    layer.gates, layer.experts = nn.ModuleList([gate]), experts
    for name, value in weights_of(case, shared).items():
        home, _, leaf = name.rpartition(".")
        inner = layer
        for part in home.split("."):
            if not hasattr(inner, part):
                inner.add_module(part, nn.Module())
            inner = getattr(inner, part)
        inner.register_parameter(leaf, nn.Parameter(value.clone()))
    return layer


_OURS = {
    "gates.0.wg.weight": "router.weight",
    "gates.0.temperature": "router.temperature",
    "gates.0.cosine_projector.weight": "router.projector.weight",
    "gates.0.cosine_projector.bias": "router.projector.bias",
    "gates.0.sim_matrix": "router.sim_matrix",
    "experts.batched_fc1_w": "experts.fc1_weight",
    "experts.batched_fc1_bias": "experts.fc1_bias",
    "experts.batched_fc2_w": "experts.fc2_weight",
    "experts.batched_fc2_bias": "experts.fc2_bias",
}


def compare(ours: MoEMlp, case: Case, shared: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Assert equality with what Tutel gave; returns the largest difference of each floating-point quantity.

    Where Tutel miscounts, cut `ours` at Tutel's number of slots first.
    """
    x = shared["x"].clone().requires_grad_()
    noise = shared["unit_noise"] * case.noise / NUM_EXPERTS if case.noise else None
    routing, plan, route, stats = ours.assign(x, noise)
    assert torch.equal(routing.expert_ids, theirs["experts"].long()), "choices"
    assert torch.equal(plan.slot, theirs["places"].long()), "places in the queues"
    limit = capacity(ours.cfg.capacity.train, NUM_TOKENS, NUM_EXPERTS, case.k)
    needed = int(stats.routed.max())
    if ours.cfg.capacity.train.kind == "dropless":
        limit = needed
    elif ours.cfg.capacity.train.kind == "bounded":
        limit = min(limit, needed)
    assert limit == int(theirs["slots"]), "capacity"
    if not case.bpr:
        assert torch.equal(stats.routed, theirs["counts"].long()), "counts before drops"
    y = ours.carry(x, routing, plan, route)
    ((y * shared["direction"]).sum() + stats.loss).backward()
    pairs = {"y": y, "l_aux": stats.loss, "gates": routing.gates, "grad.x": x.grad}
    for name in theirs:
        if name.removeprefix("grad.") in _OURS:
            grad = ours.get_parameter(_OURS[name.removeprefix("grad.")]).grad
            pairs[name] = grad.transpose(1, 2) if name == "grad.experts.batched_fc2_w" else grad
    assert len(pairs) == 4 + len(list(ours.parameters()))
    for name, value in pairs.items():
        torch.testing.assert_close(
            value.detach(), theirs[name], atol=ATOL, rtol=RTOL, msg=lambda m, n=name: f"{n}: {m}"
        )
    return {name: float((value.detach() - theirs[name]).abs().max()) for name, value in pairs.items()}


def cut_at(ours: MoEMlp, slots: int) -> MoEMlp:
    """The same layer with exactly so many slots per expert."""
    cut = CapacityPolicy(kind="fixed", factor=1e-9, min_slots=slots)
    ours.cfg = replace(ours.cfg, capacity=CapacityConfig(train=cut, eval=cut))
    return ours


def needed_slots(theirs: dict[str, Tensor]) -> int:
    """Length of the longest queue, from Tutel's own choices."""
    return int(torch.bincount(theirs["experts"].long().flatten(), minlength=NUM_EXPERTS).max())
