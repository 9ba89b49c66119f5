"""Time of an exchange over a slow link between two hosts, flat against 2DH: a measurement to run by hand, not a test.

    python tests/distributed/measure_exchange.py [--rate 1gbit] [--rounds 21]      # needs root, ip and tc

Two namespaces of two ranks each, joined by a link with a token bucket of that rate in each direction. Every rank sends
the same number of rows to every other rank. Variants take turns in each round, ranks meet before each exchange, and an
exchange lasts as long as its slowest rank. A line is fitted to the medians of messages that the link limits, time =
latency + (bytes over the link - the bucket's burst) / bandwidth, with relative errors; and where the faster of the two
changes is said. Then the step of an expert layer whose rows cross the link, in 1, 2 and 4 chunks.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from two_hosts import BURST_KIB, two_hosts, why_not

from swinmoe.comm import Journey, departure_order, direct, regroup, take, two_stages
from swinmoe.config import BalanceLossConfig, MoEConfig, ParallelConfig
from swinmoe.moe import MoEMlp
from swinmoe.parallel import apply_expert_parallel, make_mesh, use_exchange
from swinmoe.profiling import take_turns
from swinmoe.profiling.link import Sample, fit_link
from swinmoe.runtime import start_processes, stop_processes

DIM, HOSTS, PER_HOST = 256, 2, 2
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
"""Rows of 1 KiB that each rank sends to each other rank."""
WELL_ABOVE = 3
"""Bursts in the smallest message from which latency and bandwidth are fitted."""


def travel(journey: Journey, rows: Tensor, order: Any) -> Callable[[], Tensor]:
    return lambda: journey.arrive(journey.change(journey.depart(take(rows, order), "measuring"), "measuring"))


def fit(kib: Sequence[float], ms: Sequence[float], burst_kib: float = BURST_KIB) -> dict[str, float]:
    """Latency and bandwidth of ms = latency + (kib - burst)/bandwidth, errors relative to each point.

    Of messages at least `WELL_ABOVE` times the burst: smaller ones pass, wholly or by half, at the machine's own speed.
    """
    limited = [(size - burst_kib, time) for size, time in zip(kib, ms, strict=True) if size >= WELL_ABOVE * burst_kib]
    link = fit_link([Sample(1, 1024 * size, time / 1000) for size, time in limited])
    mbit_per_s = 8 * link.bandwidth / 1e6
    return {
        "latency_ms": round(1000 * link.latency, 3),
        "mbit_per_s": round(mbit_per_s, 1),
        "sizes": len(limited),
        "worst_error": round(link.worst_error, 3),
    }


def crossover(kib: Sequence[float], flat: Sequence[float], staged: Sequence[float]) -> str:
    """Between which message sizes the faster of the two changes, in words.

    Args:
        kib: message sizes, rising.
        flat: milliseconds of the flat exchange.
        staged: milliseconds of 2DH.
    """
    sizes = [f"{size:g}" for size in kib]
    faster = ["2dh" if two < one else "flat" for one, two in zip(flat, staged, strict=True)]
    changes = [
        f"{faster[i]} is faster up to {sizes[i]} KiB, {faster[i + 1]} from {sizes[i + 1]} KiB"
        for i in range(len(kib) - 1)
        if faster[i] != faster[i + 1]
    ]
    return "; ".join(changes) or f"none seen: {faster[0]} is faster at every size"


def exchanges(rounds: int) -> dict[str, Any]:
    ranks, me = dist.get_world_size(), dist.get_rank()
    token_group = make_mesh(ParallelConfig(ep_size=ranks)).token_group(
        ParallelConfig(ep_size=ranks, exchange="2dh", local_size=PER_HOST)
    )
    table = []
    for count in ROWS:
        sent = torch.full((ranks, ranks), count)
        rows = torch.randn(ranks * count, DIM)
        order = regroup(sent[me], departure_order(ranks, PER_HOST))
        steps = {
            "flat": travel(direct(sent, me, token_group.group), rows, None),
            "2dh": travel(two_stages(sent, me, PER_HOST, token_group.inner, token_group.outer), rows, order),
        }
        assert torch.equal(steps["flat"](), steps["2dh"]())
        medians = {name: timing.median for name, timing in take_turns(steps, rounds, group=dist.group.WORLD).items()}
        # Over the link, one way: each rank of a host sends to each of the other host.
        table.append({"kib_over_link": PER_HOST * PER_HOST * count * DIM * 4 / 1024, **medians})
    kib = [row["kib_over_link"] for row in table]
    return {
        "exchange_ms": [{k: round(v, 3) for k, v in row.items()} for row in table],
        "fit": {name: fit(kib, [row[name] for row in table]) for name in ("flat", "2dh")},
        "crossover": crossover(kib, [row["flat"] for row in table], [row["2dh"] for row in table]),
    }


def layer_steps(rounds: int) -> dict[str, float]:
    """Milliseconds of a training step of one layer, by chunks and exchange."""
    torch.manual_seed(dist.get_rank())
    ranks = dist.get_world_size()
    mesh = make_mesh(ParallelConfig(ep_size=ranks), 8)
    layer = MoEMlp(MoEConfig(num_experts=8, losses=BalanceLossConfig()), dim=DIM, hidden_dim=4 * DIM)
    apply_expert_parallel(layer, mesh)
    x = torch.randn(1024, DIM, requires_grad=True)
    ways = {f"flat, {c} chunks": ParallelConfig(ep_size=ranks, chunks=c) for c in (1, 2, 4)}
    ways |= {
        f"2dh, {c} chunks": ParallelConfig(ep_size=ranks, chunks=c, exchange="2dh", local_size=PER_HOST) for c in (1, 2)
    }
    ways["bf16, 1 chunks"] = ParallelConfig(ep_size=ranks, payload="bf16")
    ways["weights travel"] = ParallelConfig(ep_size=ranks, weight_group=ranks)

    def step_with(way: ParallelConfig) -> Callable[[], None]:
        def step() -> None:
            use_exchange(layer, mesh, way)
            layer.zero_grad(set_to_none=False)
            layer(x)[0].square().sum().backward()

        return step

    taken = take_turns({name: step_with(way) for name, way in ways.items()}, rounds, group=mesh.world_group)
    return {name: round(timing.median, 2) for name, timing in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        torch.set_num_threads(1)
        start_processes(cpu=True)
        report = exchanges(args.rounds) | {"layer_step_ms": layer_steps(args.rounds)}
        if dist.get_rank() == 0:
            print(json.dumps(report, indent=1))
        stop_processes()
        return
    if (reason := why_not()) is not None:
        sys.exit(reason)
    with two_hosts(rate=args.rate) as hosts:
        outputs = hosts.torchrun(
            __file__, "--inside", "--rounds", str(args.rounds), per_host=PER_HOST, extra={"GLOO_LOG": ""}, timeout=900
        )
    print(*(output.stdout for output in outputs), sep="", end="")
    if any(output.status for output in outputs):
        sys.exit("\n".join(output.stderr for output in outputs))


if __name__ == "__main__":
    main()
