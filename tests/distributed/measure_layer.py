"""Time of an expert-parallel layer's step beside its peers: a measurement to run by hand, not a test.

    torchrun --nproc-per-node 2 tests/distributed/measure_layer.py [--rounds 31]

Every arm trains one step (forward and backward) on the same tokens, one thread a process; arms take turns in a round,
ranks meet before each step, and a step lasts as long as its slowest rank. Balance is forced: the gate sends token t to
expert t mod E. Tutel's layer takes part where it is installed. Gradients stay from step to step and are set to zero in
it, except in the arms that say `given back`, which let them go as `optimizer.zero_grad()` does. Rank 0 prints JSON:
medians in ms, and what they are over the dense MLP's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from swinmoe.config import CapacityConfig, CapacityPolicy, MoEConfig, ParallelConfig
from swinmoe.moe import MoEMlp
from swinmoe.parallel import Mesh, apply_expert_parallel, make_mesh
from swinmoe.profiling import take_turns
from swinmoe.runtime import start_processes, stop_processes

Step = Callable[[], None]
PEERS = (("tutel", 1.0, False), ("tutel, no drops", 0.0, True), ("tutel as in Swin-MoE", 1.25, True))
"""Name, capacity factor, and whether it is set up as Swin-MoE's is. Balance makes 1.0 and no drops the same rows."""


def step_of(module: nn.Module, x: Tensor, slope: Tensor, *, give_back: bool = False) -> Step:
    def step() -> None:
        module.zero_grad(set_to_none=give_back)
        y = module(x)
        y, stats = y if isinstance(y, tuple) else (y, None)
        loss = stats.loss if stats is not None else getattr(y, "l_aux", None)
        torch.autograd.backward([y, loss], [slope, None]) if loss is not None else y.backward(slope)

    return step


def force_balance(gate: Tensor) -> None:
    """Gate (E, D): expert e looks at feature e alone."""
    with torch.no_grad():
        gate.zero_()
        gate[:, : len(gate)] = torch.eye(len(gate))


def ours(args: argparse.Namespace, mesh: Mesh, **changes: Any) -> MoEMlp:
    fixed = CapacityPolicy(kind="fixed", factor=1.0)
    cfg = MoEConfig(
        num_experts=args.experts,
        dispatcher=changes.pop("dispatcher", "ragged"),
        capacity=CapacityConfig(train=fixed, eval=fixed) if changes.pop("fixed", False) else CapacityConfig(),
    )
    layer = MoEMlp(cfg, dim=args.dim, hidden_dim=args.hidden)
    force_balance(layer.router.weight)
    parallel = ParallelConfig(ep_size=mesh.world, **changes)
    apply_expert_parallel(layer, make_mesh(parallel, args.experts))
    return layer


def experts_alone(args: argparse.Namespace, layer: MoEMlp, world: int) -> Step:
    """What the layer's experts do, with the rows already there."""
    segments = torch.full((1, args.experts // world), args.tokens // args.experts * world)
    rows = torch.randn(int(segments.sum()), args.dim, requires_grad=True)
    slope = torch.randn_like(rows)

    def step() -> None:
        layer.zero_grad(set_to_none=False)
        layer.experts.function(True)(rows, segments, layer.experts.weights()).backward(slope)

    return step


def tutel_layer(args: argparse.Namespace, world: int, factor: float, *, swin_moe: bool) -> nn.Module | None:
    """With a capacity factor (0: no drops), and either ours' loss and no noise, or as Swin-MoE's configs have it:
    noise, load and importance loss, and priority where there may be drops."""
    try:
        from tutel import moe as tutel_moe
    except ImportError:
        return None
    layer: nn.Module = tutel_moe.moe_layer(
        gate_type={"type": "top", "k": 1, "capacity_factor": factor, "fp32_gate": True}
        | ({"gate_noise": 1.0} if swin_moe else {}),
        model_dim=args.dim,
        experts={
            "num_experts_per_device": args.experts // world,
            "type": "ffn",
            "hidden_size_per_expert": args.hidden,
            "activation_fn": F.gelu,
        },
        batch_prioritized_routing=swin_moe and factor > 0,
        is_gshard_loss=not swin_moe,
        normalize_gate=False,
    )
    force_balance(layer.gates[0].wg.weight)
    return layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tokens": 2304, "dim": 384, "hidden": 1536, "experts": 8, "rounds": 31}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start_processes(cpu=True)
    world = dist.get_world_size()
    mesh = make_mesh(ParallelConfig(ep_size=world), args.experts)
    x = torch.randn(args.tokens, args.dim) * 0.1
    x[torch.arange(args.tokens), torch.arange(args.tokens) % args.experts] += 3
    x.requires_grad_()
    slope = torch.randn(args.tokens, args.dim)
    dense = nn.Sequential(nn.Linear(args.dim, args.hidden), nn.GELU(), nn.Linear(args.hidden, args.dim))
    layer, padded = ours(args, mesh), ours(args, mesh, dispatcher="padded", fixed=True)
    steps = {
        "dense MLP": step_of(dense, x, slope),
        "experts alone": experts_alone(args, layer, world),
        "ragged": step_of(layer, x, slope),
        "ragged, given back": step_of(ours(args, mesh), x, slope, give_back=True),
        "padded": step_of(padded, x, slope),
        "padded, given back": step_of(ours(args, mesh, dispatcher="padded", fixed=True), x, slope, give_back=True),
        "ragged, 2 chunks": step_of(ours(args, mesh, chunks=2), x, slope),
        "weights travel": step_of(ours(args, mesh, weight_group=world), x, slope),
    }
    _, stats = layer(x)
    assert set(stats.routed.tolist()) == {args.tokens // args.experts}, "balance was meant to be forced"
    for name, factor, swin_moe in PEERS:
        peer = tutel_layer(args, world, factor, swin_moe=swin_moe)
        if peer is not None:
            steps[name] = step_of(peer, x, slope)
    taken = take_turns(steps, args.rounds, group=mesh.world_group)
    if dist.get_rank() == 0:
        medians = {name: timing.median for name, timing in taken.items()}
        report = {
            "shapes": vars(args) | {"processes": world},
            "ms": {name: round(value, 2) for name, value in medians.items()},
            "over dense": {name: round(value / medians["dense MLP"], 3) for name, value in medians.items()},
            "outside experts": round(1 - medians["experts alone"] / medians["ragged"], 3),
        }
        for peer_name in (name for name in medians if name.startswith("tutel")):
            report[f"over {peer_name}"] = {n: round(value / medians[peer_name], 3) for n, value in medians.items()}
        print(json.dumps(report, indent=1))
    stop_processes()


if __name__ == "__main__":
    main()
