"""This machine in figures: a few seconds of products, elementwise work and messages, and what they say.

Products of several shapes give FLOP and bytes per second and the time of a call, by non-negative least squares of
relative errors; every other kind of work is one operator, timed for itself. With several processes on the machine it
is measured besides how much slower they are side by side, and what their messages take.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls

from swinmoe.comm import all_reduce_max, all_to_all_rows
from swinmoe.comm.all_to_all import Group
from swinmoe.comm.neighbours import first_ranks, link_of
from swinmoe.config import MoEConfig, ParallelConfig
from swinmoe.errors import ConfigError
from swinmoe.moe import MoEMlp
from swinmoe.parallel import Mesh, make_mesh
from swinmoe.profiling.clock import Step, meet, take_turns
from swinmoe.profiling.link import Sample, fit_link
from swinmoe.profiling.plan.cost import Cost, product
from swinmoe.profiling.plan.hardware import NEVER, WIDTH, Figure, Hardware, Link, Rates, Sharing
from swinmoe.runtime import describe_environment

SHAPES = ((4608, 384, 384), (4608, 1536, 384), (2304, 384, 1536), (1152, 768, 768), (576, 192, 96), (128, 128, 128))
"""(m, n, k) of products."""
WINDOWS = ((512, 49, 32), (128, 144, 32), (64, 16, 16))
"""(batch, tokens, width of a head) of attention's products."""
ROWS, DIM, EXPERTS = 4608, 384, 8
PIECES = 3
"""Times that processes in lockstep go through their pieces of work."""
SIZES = (2**8, 2**12, 2**15, 2**18, 2**20, 2**22)
"""Bytes of messages."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class _Bench:
    """One piece of work and what it consists of."""

    name: str
    cost: Cost
    step: Step


def calibrate(device: torch.device, *, rounds: int = 9, say: Callable[[str], None] = lambda text: None) -> Hardware:
    """The hardware under this process, or under all processes of the job; a collective call.

    Args:
        device: what to measure.
        rounds: times that each piece of work is timed; medians count.
        say: told what is being done.

    Raises:
        ConfigError: fewer than 3 rounds.
    """
    if rounds < 3:
        raise ConfigError(f"--rounds {rounds}: medians need at least 3")
    mesh = make_mesh(ParallelConfig())
    say("products and elementwise work")
    benches = [*_products("fp32", device), *_streams(device)]
    seconds = _timed({bench.name: bench.step for bench in benches}, rounds, device)
    source = f"measured by swinmoe plan --calibrate on {_machine(device)}"
    rate, traffic, call, error = _fit([b for b in benches if b.cost.flops and b.name != "route"], seconds)
    figures = {
        "fp32": Figure(value=rate, source=f"{source}; products within {100 * error:.0f} % of the fit (median)"),
        "products": Figure(value=traffic, source=source),
    }
    for precision in ("bf16", "fp16"):
        figures[precision] = Figure(value=_large_product(precision, device, rounds), source=source)
    for bench in benches:
        kind = bench.name
        if kind in ("copy", "norm", "softmax", "activation", "rows", "route", "update"):
            left = seconds[kind] - bench.cost.calls * call - bench.cost.flops / rate - bench.cost.products / traffic
            figures[kind] = Figure(value=getattr(bench.cost, kind) / max(left, 0.1 * seconds[kind]), source=source)
    here = Hardware(
        name=_machine(device),
        device="cuda" if device.type == "cuda" else "cpu",
        processes_per_node=mesh.world,
        memory=_memory(device, mesh.world),
        reserved=Figure(value=5e8 if device.type == "cpu" else 3e9, source="our estimate: interpreter and libraries"),
        rates=Rates(**figures),
        call=Figure(value=call, source=source),
        inside=_nowhere(),
        between=_nowhere(),
        overlap=Figure(
            value=0.0 if device.type == "cpu" else 0.8,
            source="our estimate: on a CPU, what moves bytes is the processor that computes",
        ),
        fused_attention=device.type == "cuda",
    )
    if mesh.world == 1:
        return here
    say("messages")
    # On a CPU between 2, 4, 8, ... of them too: with more processes than cores, who is waited for may not be running.
    doubled = [2**n for n in range(1, mesh.world.bit_length()) if 2**n < mesh.world] if device.type == "cpu" else []
    counts = (*doubled, mesh.world)
    links = {count: _links(count, mesh, rounds, device, source) for count in counts}
    inside, shared = links[mesh.world]
    here = replace(here, inside=inside, between=inside, shared=shared)
    if device.type != "cpu":
        return here
    say("processes side by side")
    sharing = []
    for processes, slowdown in _slowdowns(mesh, rounds, source):
        between_them = links.get(processes, (None, None))
        sharing.append(
            Sharing(
                processes=processes,
                slowdown=slowdown,
                inside=between_them[0],
                shared=between_them[1],
                lockstep=_lockstep(processes, mesh, rounds, source) if processes in links else None,
            )
        )
    return replace(here, sharing=tuple(sharing))


def _products(precision: str, device: torch.device) -> Iterator[_Bench]:
    dtype, width = DTYPES[precision], WIDTH[precision]
    for m, n, k in SHAPES:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
        yield _Bench(f"{m}x{n}x{k}", product(m, n, k, width), _bound(F.linear, a, b))
    for batch, tokens, dim in WINDOWS:
        q = torch.randn(batch, tokens, dim, device=device, dtype=dtype)
        cost = product(tokens, tokens, dim, width, batch=batch)
        yield _Bench(f"{batch} windows of {tokens}", cost, _bound(torch.matmul, q, q.transpose(1, 2)))


def _bound(function: Callable[..., object], *arguments: object) -> Step:
    return lambda: function(*arguments)


def _streams(device: torch.device) -> Iterator[_Bench]:
    """One operator of each other kind, forward and backward where there is one, with the passes that `work` counts."""
    x = torch.randn(ROWS, DIM, device=device)
    size = float(x.nbytes)
    ends = torch.randn_like(x)
    weight, bias = torch.ones(DIM, device=device), torch.zeros(DIM, device=device)
    leaf = torch.randn(ROWS, DIM, device=device, requires_grad=True)
    scores = torch.randn(64, 12, 49, 49, device=device, requires_grad=True)
    slope = torch.randn_like(scores)
    order = torch.randperm(ROWS, device=device)
    yield _Bench("copy", Cost(copy=3 * size, calls=1), lambda: x + ends)
    yield _Bench(
        "norm", Cost(norm=5 * size, calls=2), _both(lambda: F.layer_norm(leaf, (DIM,), weight, bias), leaf, ends)
    )
    yield _Bench(
        "softmax", Cost(softmax=5.0 * scores.nbytes, calls=2), _both(lambda: scores.softmax(-1), scores, slope)
    )
    yield _Bench("activation", Cost(activation=5 * size, calls=2), _both(lambda: F.gelu(leaf), leaf, ends))
    yield _Bench("rows", Cost(rows=2 * size, calls=1), lambda: x.index_select(0, order))
    yield _routing(device)
    parameter = torch.nn.Parameter(torch.randn(4 * 2**20, device=device))
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter], lr=1e-12, fused=True)
    yield _Bench("update", Cost(update=7.0 * parameter.nbytes, calls=1), optimizer.step)


def _routing(device: torch.device) -> _Bench:
    """An expert layer's decisions, with the counts that `work` gives them."""
    layer = MoEMlp(MoEConfig(num_experts=EXPERTS), dim=DIM, hidden_dim=DIM, device=device)
    tokens = torch.randn(ROWS, DIM, device=device)
    cost = product(ROWS, EXPERTS, DIM, 4)
    cost += Cost(route=4.0 * ROWS * EXPERTS * 10 + 8.0 * ROWS * 12, calls=40)

    def decide() -> None:
        with torch.no_grad():
            layer.assign(tokens, None)

    return _Bench("route", cost, decide)


def _both(forward: Callable[[], torch.Tensor], leaf: torch.Tensor, slope: torch.Tensor) -> Step:
    def step() -> None:
        leaf.grad = None
        forward().backward(slope)

    return step


def _timed(steps: Mapping[str, Step], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each on the first process, while all others wait: side by side they would share its cores."""
    mesh = make_mesh(ParallelConfig())
    medians = torch.zeros(len(steps), dtype=torch.float64)
    if mesh.rank == 0:
        taken = take_turns(dict(steps), rounds, device=device)
        medians = torch.tensor([timing.median / 1000 for timing in taken.values()], dtype=torch.float64)
    medians = all_reduce_max(medians, mesh.world_group, "waiting for the first process's times")
    return dict(zip(steps, medians.tolist(), strict=True))


def _fit(benches: Sequence[_Bench], seconds: Mapping[str, float]) -> tuple[float, float, float, float]:
    """FLOP/s, bytes/s, seconds of a call, and the median relative error, of products."""
    design = np.array([[b.cost.flops, b.cost.products, b.cost.calls] for b in benches])
    times = np.array([seconds[b.name] for b in benches])
    scale = design.max(0)
    found, _ = nnls(design / scale / times[:, None], np.ones(len(times)))
    slow = found / scale
    errors = design @ slow / times - 1
    # A cost that no time asked for is free: a rate that is out of reach, and still a number
    rates = [float(1 / value) if value > 0 else 1e18 for value in slow[:2]]
    return rates[0], rates[1], float(slow[2]), float(np.median(np.abs(errors)))


def _large_product(precision: str, device: torch.device, rounds: int) -> float:
    m, n, k = SHAPES[1]
    dtype = DTYPES[precision]
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    return 2 * m * n * k / _timed({"product": _bound(F.linear, a, b)}, rounds, device)["product"]


def _memory(device: torch.device, processes: int) -> Figure:
    if device.type == "cuda":
        return Figure(value=float(torch.cuda.get_device_properties(device).total_memory), source="as the device says")
    import os

    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Figure(value=total / processes, source=f"the machine's {total / 2**30:.1f} GiB, shared by {processes}")


def _nowhere() -> Link:
    """Of one process, which has nobody to send to."""
    why = "not measured: calibrated on one process"
    return Link(
        latency=Figure(value=0.0, source=why),
        bandwidth=Figure(value=NEVER, source=why),
        half_message=Figure(value=0.0, source=why),
    )


def _links(count: int, mesh: Mesh, rounds: int, device: torch.device, source: str) -> tuple[Link, Link | None]:
    """Of an all-to-all among the first `count` processes, while the others wait: the link of the backend, by which sums
    and gathers go and rows to other hosts, and that of shared memory, by which rows go where there is one."""
    group = first_ranks(count)
    shares = torch.tensor(float(group is not None and device.type == "cpu" and link_of(group) is not None))
    ways = {"over sockets" if device.type == "cpu" else "by the device's library": group}
    if all_reduce_max(shares, mesh.world_group, "asking who shares memory"):
        ways = {"through shared memory": group, "over sockets": first_ranks(count, by_backend=True)}
    links = {}
    for way, members in ways.items():
        # Who is not among them has zeros, and learns.
        own = torch.tensor(_link(members, rounds, device), dtype=torch.float64)
        latency, bandwidth, half, error = all_reduce_max(own, mesh.world_group, "telling of links").tolist()
        why = f"{source}; all-to-all of {count} ranks {way}, typical error {100 * error:.0f} %"
        links[way] = Link(
            latency=Figure(value=latency, source=why),
            bandwidth=Figure(value=bandwidth, source=why),
            half_message=Figure(value=half, source=why),
        )
    return links[way], links.get("through shared memory")


def _link(group: Group, rounds: int, device: torch.device) -> list[float]:
    """Latency, bandwidth, half message and typical error of an all-to-all; zeros for who is not in the group."""
    if group is None:
        return [0.0] * 4
    steps: dict[str, Step] = {}
    world = group.size()
    for size in SIZES:
        rows = torch.zeros(world, size // 4, device=device)
        steps[str(size)] = _bound(all_to_all_rows, rows, [1] * world, [1] * world, group)
    taken = take_turns(steps, rounds, group=group, device=device)
    fitted = fit_link([Sample(world - 1, size, taken[str(size)].median / 1000) for size in SIZES])
    return [fitted.latency, min(fitted.bandwidth, NEVER), fitted.half_message, fitted.typical_error]


def _slowdowns(mesh: Mesh, rounds: int, source: str) -> Iterator[tuple[int, Figure]]:
    """How much slower a mix of work is on every number of processes at once; the others wait."""
    device = torch.device("cpu")
    mix = [b for b in (*_products("fp32", device), *_streams(device)) if b.name in ("4608x1536x384", "norm", "copy")]

    def work() -> None:
        for bench in mix:
            bench.step()

    alone = None
    for processes in range(1, mesh.world + 1):
        mine = work if mesh.rank < processes else (lambda: None)
        taken = take_turns({"mix": mine}, rounds, group=mesh.world_group)["mix"].ms
        median = statistics.median(taken)
        alone = median if alone is None else alone
        yield processes, Figure(value=median / alone, source=source)


def _lockstep(processes: int, mesh: Mesh, rounds: int, source: str) -> Figure:
    """How much longer so many processes at once take for small pieces of work if all wait for the slowest after each,
    without what the messages take by which they wait; the other processes wait for all of it."""
    device = torch.device("cpu")
    mix = [b for b in (*_products("fp32", device), *_streams(device)) if b.name in ("1152x768x768", "norm", "copy")]
    group = first_ranks(processes)

    def work(meets: bool, computes: bool = True) -> None:
        if group is None:
            return
        for _ in range(PIECES):
            for bench in mix:
                if computes:
                    bench.step()
                if meets:
                    meet(group)

    steps: dict[str, Step] = {
        "apart": _bound(work, False),
        "lockstep": _bound(work, True),
        "messages": _bound(work, True, False),
    }
    taken = take_turns(steps, rounds, group=mesh.world_group)
    apart, lockstep, messages = (taken[name].median for name in steps)
    return Figure(value=max(1.0, (lockstep - messages) / apart), source=source)


def _machine(device: torch.device) -> str:
    """In words, without names of hosts."""
    environment = describe_environment()
    if device.type == "cuda":
        return str(environment["device"])
    return f"{environment['cpu']}, {environment['cores']} cores, {environment['torch_threads']} thread(s) a process"
