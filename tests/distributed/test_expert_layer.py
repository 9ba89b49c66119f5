"""One expert layer spread over ranks against the same layer on one process: outputs, every gradient, losses, traffic.

The oracle holds all experts, runs in the same process, and sees the tokens of all ranks.
"""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from pool import Pool
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from swinmoe.comm import all_gather_rows, all_to_all, listen
from swinmoe.config import (
    BalanceLossConfig,
    CapacityConfig,
    CapacityPolicy,
    ExpertConfig,
    MoEConfig,
    ParallelConfig,
    RouterConfig,
)
from swinmoe.errors import ConfigError
from swinmoe.moe import MoEMlp, expert_mlp
from swinmoe.parallel import (
    apply_expert_parallel,
    expert_parameter_names,
    gather_full,
    global_sum,
    make_mesh,
    sync_expert_gradients,
    take_local,
    use_exchange,
)

pytestmark = pytest.mark.distributed

DIM, HIDDEN = 12, 24
TOLERANCE = 1e-10
SPREAD = ParallelConfig(ep_size=2)
LOSSES: dict[str, Any] = {"gshard": 0.3, "importance": 0.2, "z": 0.1}


def config(**changes: Any) -> MoEConfig:
    return MoEConfig(**{"num_experts": 4, "losses": BalanceLossConfig(**LOSSES), **changes})


def make_layer(cfg: MoEConfig) -> MoEMlp:
    """In float64, every parameter drawn anew: biases too, and a gate sharp enough to choose."""
    layer = MoEMlp(cfg, dim=DIM, hidden_dim=HIDDEN, dtype=torch.float64)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) / 2)
    return layer


def tokens_of_all(counts: list[int]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(11)
    return [torch.randn(count, DIM, generator=draw, dtype=torch.float64) for count in counts]


def task_loss(x: Tensor, y: Tensor) -> Tensor:
    """A sum over tokens that weighs each output by its token, so that mixed-up rows do not cancel."""
    return (y * (x.detach().flip(-1) + 0.5).square()).sum()


def compare_with_oracle(
    cfg: MoEConfig, counts: list[int], parallel: ParallelConfig, dtype: torch.dtype = torch.float64
) -> dict[str, float]:
    """Largest differences of a spread layer in `dtype`, each over the oracle's largest value (at least 1)."""
    mesh = make_mesh(parallel, cfg.num_experts)
    oracle = make_layer(cfg)
    spread = copy.deepcopy(oracle).to(dtype)
    apply_expert_parallel(spread, mesh)
    everyone = tokens_of_all(counts)

    # Where capacity drops tokens, ranks are routing groups: the oracle takes one rank's tokens at a time.
    together = cfg.capacity.train.kind == "dropless" and cfg.losses.batch == "global"
    groups = [torch.cat(everyone)] if together else everyone
    inputs = [group.clone().requires_grad_() for group in groups]
    outputs, reports = zip(*(oracle(group) for group in inputs), strict=True)
    loss = sum((task_loss(x, y) + r.loss for x, y, r in zip(inputs, outputs, reports, strict=True)), torch.zeros(()))
    loss.backward()
    first = sum(counts[: mesh.rank])
    mine = slice(first, first + counts[mesh.rank])

    x = everyone[mesh.rank].to(dtype, copy=True).requires_grad_()
    y, report = spread(x)
    (task_loss(x, y) + report.loss).backward()
    sync_expert_gradients(spread, mesh)

    def difference(found: Tensor, expected: Tensor) -> float:
        assert found.shape == expected.shape, (found.shape, expected.shape)
        if found.numel() == 0:
            return 0.0
        return float((found - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1))

    assert x.grad is not None
    result = {
        "output": difference(y, torch.cat(outputs)[mine]),
        "input gradient": difference(x.grad, torch.cat([i.grad for i in inputs if i.grad is not None])[mine]),
        "routed": difference(global_sum(report.routed, mesh), sum(r.routed for r in reports)),  # type: ignore[arg-type]
        "kept": difference(global_sum(report.kept, mesh), sum(r.kept for r in reports)),  # type: ignore[arg-type]
    }
    own = reports[0] if together else reports[mesh.rank]
    result["balance loss"] = difference(report.loss, own.loss)
    names = expert_parameter_names(spread)
    assert names == (
        {n for n, _ in oracle.named_parameters() if n.startswith("experts.")} if mesh.ep_size > 1 else set()
    )
    for (name, found), (_, expected) in zip(spread.named_parameters(), oracle.named_parameters(), strict=True):
        assert found.grad is not None and expected.grad is not None, name
        gradient = found.grad if name in names else global_sum(found.grad, mesh)
        result[name] = difference(gradient, take_local(expected.grad, found, mesh))
        result[f"{name} gathered"] = (
            difference(gather_full(found.grad, found, mesh), expected.grad) if name in names else 0
        )
        assert torch.equal(gather_full(found, found, mesh), expected.to(dtype))
    if cfg.capacity.train.kind != "dropless":
        result["drops"] = -float(sum(r.routed.sum() - r.kept.sum() for r in reports))  # type: ignore[arg-type]
    return result


def check(results: list[dict[str, float]], drops: bool = False, tolerance: float = TOLERANCE) -> None:
    for rank, result in enumerate(results):
        if drops:
            assert result.pop("drops") < 0, "the case was meant to drop tokens"
        worst = max(result, key=lambda name: result[name])
        assert result[worst] <= tolerance, f"rank {rank}: {worst} is off by {result[worst]:.2e}"


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("counts", [[7, 12], [0, 9], [0, 0], [1, 1]])
def test_dropless_equals_one_process(pool2: Pool, layout: str, top_k: int, counts: list[int]) -> None:
    check(pool2.run(compare_with_oracle, config(dispatcher=layout, top_k=top_k), counts, SPREAD))


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("kind", ["fixed", "bounded"])
def test_drops_are_those_of_each_rank_alone(pool2: Pool, layout: str, prioritized: bool, kind: Any) -> None:
    tight = CapacityConfig(train=CapacityPolicy(kind=kind, factor=0.5))
    cfg = config(
        dispatcher=layout,
        top_k=2,
        capacity=tight,
        router=RouterConfig(batch_prioritized=prioritized),
        losses=BalanceLossConfig(batch="local", **LOSSES),
    )
    # Token counts differ, and with them capacities: the padded layout has to agree on the larger buffer.
    check(pool2.run(compare_with_oracle, cfg, [9, 16], SPREAD), drops=True)


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_four_ranks_in_every_mesh(pool4: Pool, layout: str, ep_size: int) -> None:
    cfg = config(num_experts=8, dispatcher=layout, top_k=2)
    check(pool4.run(compare_with_oracle, cfg, [5, 0, 8, 3], ParallelConfig(ep_size=ep_size)))


@pytest.mark.parametrize("expert", ["gelu", "swiglu"])
def test_other_layers_spread_too(pool2: Pool, expert: str) -> None:
    cfg = config(
        router=RouterConfig(type="cosine", proj_dim=4, normalize_gates=True),
        experts=ExpertConfig(type=expert, hidden_ratio=0.5),
        shared_expert_ratio=0.5,
        top_k=2,
    )
    check(pool2.run(compare_with_oracle, cfg, [6, 5], SPREAD))


WAYS = {
    "sliced": (2, ParallelConfig(ep_size=4)),
    "one expert in four slices": (1, ParallelConfig(ep_size=4)),
    "weights": (8, ParallelConfig(ep_size=4, weight_group=4)),
    "weights, sliced": (2, ParallelConfig(ep_size=4, weight_group=4)),
    "weights, replicas": (4, ParallelConfig(ep_size=2, weight_group=2)),
    "both": (8, ParallelConfig(ep_size=4, weight_group=2)),
    "both, whole experts of slices": (2, ParallelConfig(ep_size=4, weight_group=2)),
    "both, larger slices": (1, ParallelConfig(ep_size=4, weight_group=2)),
    "2dh": (8, ParallelConfig(ep_size=4, exchange="2dh", local_size=2)),
    "2dh, sliced": (2, ParallelConfig(ep_size=4, exchange="2dh", local_size=2)),
    "2dh of one node": (8, ParallelConfig(ep_size=4, exchange="2dh", local_size=4)),
    "2dh of single ranks": (8, ParallelConfig(ep_size=4, exchange="2dh", local_size=1)),
    "2dh over the launcher's nodes": (8, ParallelConfig(ep_size=4, exchange="2dh")),
    "chunks of experts": (8, ParallelConfig(ep_size=4, chunks=2)),
    "chunks of rows": (8, ParallelConfig(ep_size=4, chunks=3)),
    "chunks, sliced": (2, ParallelConfig(ep_size=4, chunks=2)),
    "chunks, replicas": (4, ParallelConfig(ep_size=2, chunks=2)),
    "chunks, 2dh, both": (8, ParallelConfig(ep_size=4, exchange="2dh", local_size=2, weight_group=2, chunks=2)),
    "chunks, 2dh": (8, ParallelConfig(ep_size=4, exchange="2dh", local_size=2, chunks=4)),
}


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_travel(pool4: Pool, way: str, layout: str) -> None:
    num_experts, parallel = WAYS[way]
    cfg = config(num_experts=num_experts, dispatcher=layout, top_k=min(2, num_experts))
    check(pool4.run(compare_with_oracle, cfg, [5, 0, 8, 3], parallel))


def compare_in_single_precision(cfg: MoEConfig, counts: list[int], parallel: ParallelConfig) -> dict[str, float]:
    """As above; and how often experts took our kernel in C++."""
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        genuine = expert_mlp.kernel_mlp
        patch.setattr(expert_mlp, "kernel_mlp", lambda *given: taken.append(1) or genuine(*given))
        result = compare_with_oracle(cfg, counts, parallel, torch.float32)
    return result | {"taken": len(taken)}


@pytest.mark.usefixtures("expert_kernel")
@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize(
    "way",
    ["sliced", "weights", "weights, sliced", "both", "2dh", "chunks of experts", "chunks of rows", "chunks, sliced"],
)
def test_spread_experts_take_the_kernel(pool4: Pool, way: str, layout: str) -> None:
    """In single precision: beside it everything here is in double, which the kernel leaves to others."""
    num_experts, parallel = WAYS[way]
    cfg = config(num_experts=num_experts, dispatcher=layout, top_k=2)
    results = pool4.run(compare_in_single_precision, cfg, [5, 0, 8, 3], parallel)
    assert [result.pop("taken") for result in results] == [parallel.chunks] * 4
    check(results, tolerance=1e-5)


@pytest.mark.parametrize(("nodes", "local_size"), [(2, 3), (3, 2)])
@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("num_experts", [12, 2])
def test_node_shapes_in_which_swapped_axes_show(
    pool6: Pool, nodes: int, local_size: int, layout: str, num_experts: int
) -> None:
    parallel = ParallelConfig(ep_size=nodes * local_size, exchange="2dh", local_size=local_size, chunks=2)
    cfg = config(num_experts=num_experts, dispatcher=layout, top_k=2)
    check(pool6.run(compare_with_oracle, cfg, [5, 0, 8, 3, 1, 4], parallel))


def switched() -> float:
    """One spread layer, its exchange changed between passes: largest difference of outputs and expert gradients."""
    mesh = make_mesh(ParallelConfig(ep_size=4), 8)
    layer = make_layer(config(num_experts=8, top_k=2))
    apply_expert_parallel(layer, mesh)
    places = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    x = tokens_of_all([5, 0, 8, 3])[mesh.rank]
    seen = []
    for way in (
        mesh.config,
        *(parallel for experts, parallel in WAYS.values() if (experts, parallel.ep_size) == (8, 4)),
    ):
        use_exchange(layer, mesh, way)
        layer.zero_grad()
        y, _ = layer(x)
        task_loss(x, y).backward()
        seen.append([y.detach(), *(p.grad for n, p in layer.named_parameters() if n.startswith("experts."))])
    assert places == {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    assert len(seen) > 5
    return max(float((a - b).abs().max()) for way in seen for a, b in zip(way, seen[0], strict=True) if a.numel())


def test_the_exchange_changes_between_steps(pool4: Pool) -> None:
    assert max(pool4.run(switched)) <= TOLERANCE


def order_of_events(chunks: int) -> tuple[list[str], list[str]]:
    """What happens when in one pass: messages sent and waited for, experts at work."""
    layer = make_layer(config(num_experts=8, losses=BalanceLossConfig()))
    mesh = make_mesh(ParallelConfig(ep_size=2, chunks=chunks), 8)
    apply_expert_parallel(layer, mesh)
    events: list[str] = []

    def noting(name: str) -> Any:
        genuine = getattr(all_to_all._Hop, name)

        def call(*arguments: Any, **options: Any) -> Any:
            events.append(name)
            return genuine(*arguments, **options)

        return call

    function = layer.experts.function

    def experts(training: bool) -> Any:
        def run(rows: Tensor, segments: Tensor | None, weights: Any) -> Tensor:
            events.append("experts")
            done = function(training)(rows, segments, weights)
            done.register_hook(lambda _: events.append("experts"))
            return done

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(all_to_all._Hop, "launch", noting("launch"))
        patch.setattr(all_to_all._Hop, "land", noting("land"))
        patch.setattr(layer.experts, "function", experts)
        y, _ = layer(tokens_of_all([5, 3])[mesh.rank].requires_grad_())
        forward = list(events)
        events.clear()
        y.sum().backward()
    return forward, events


def test_experts_work_while_rows_travel_in_both_directions(pool2: Pool) -> None:
    """Launched but not yet landed: a transfer that runs beside the experts, forward and backward."""
    for ways in pool2.run(order_of_events, 1):
        for events in ways:
            assert events == ["launch", "land", "experts", "launch", "land"]
    for ways in pool2.run(order_of_events, 3):
        for events in ways:
            under_way = [events[:i].count("launch") - events[:i].count("land") for i in range(len(events))]
            beside = [flights for event, flights in zip(events, under_way, strict=True) if event == "experts"]
            assert beside == [2, 2, 2], events
            assert events.count("launch") == events.count("land") == 6


def rounded() -> float:
    """Relative error of a layer whose travelling rows are rounded to bfloat16."""
    layer = make_layer(config(losses=BalanceLossConfig()))
    mesh = make_mesh(ParallelConfig(ep_size=2, payload="bf16"), 4)
    x = tokens_of_all([7, 5])[mesh.rank]
    expected, _ = layer(x)
    apply_expert_parallel(layer, mesh)
    y, _ = layer(x)
    assert y.dtype == torch.float64
    return float((y - expected).detach().abs().max() / expected.detach().abs().max())


def test_a_light_payload_rounds_and_does_no_more(pool2: Pool) -> None:
    for error in pool2.run(rounded):
        assert 1e-4 < error < 2**-6


def under_autocast(parallel: ParallelConfig) -> dict[str, Any]:
    """A layer in bfloat16, spread and alone: dtype and values of outputs, and bytes of the exchanges."""
    num_experts = 2 if parallel.ep_size == 4 else 4
    layer = make_layer(config(num_experts=num_experts, losses=BalanceLossConfig())).float()
    mesh = make_mesh(parallel, num_experts)
    x = tokens_of_all([7, 5, 3, 4])[mesh.rank].float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        alone, _ = layer(x)
    apply_expert_parallel(layer, mesh)
    with torch.autocast("cpu", torch.bfloat16), listen() as forward:
        y, stats = layer(x)
    with listen() as backward:
        y.float().sum().backward()
    matrix = all_gather_rows(stats.kept, mesh.ep_group).view(mesh.ep_size, -1)
    rows, owners = remote_rows(matrix, mesh.ep_rank, mesh.ep_size)
    return {
        "dtypes": (y.dtype, alone.dtype),
        "off": float((y.float() - alone.float()).detach().abs().max() / alone.float().detach().abs().max()),
        "sent": [[m.bytes for m in way if m.operation == "all_to_all"] for way in (forward, backward)],
        "remote": int((rows * (owners != mesh.ep_rank)).sum()),
    }


@pytest.mark.parametrize("chunks", [1, 2])
def test_under_autocast_a_spread_layer_is_the_local_one_and_sends_half_the_bytes(pool2: Pool, chunks: int) -> None:
    for seen in pool2.run(under_autocast, ParallelConfig(ep_size=2, chunks=chunks)):
        assert seen["dtypes"] == (torch.bfloat16, torch.bfloat16)
        assert seen["off"] == 0.0
        forward, backward = seen["sent"]
        assert sum(forward[:chunks]) == seen["remote"] * DIM * 2
        assert sum(backward) == sum(forward)


def test_under_autocast_slices_are_summed_in_full(pool4: Pool) -> None:
    for seen in pool4.run(under_autocast, ParallelConfig(ep_size=4)):
        assert seen["dtypes"] == (torch.bfloat16, torch.bfloat16)
        assert seen["off"] < 2**-6


def light_bytes() -> tuple[list[float], list[float]]:
    """Bytes of a float64 layer's exchanges with a whole and with a light payload, forward and backward."""
    seen = []
    for payload in ("full", "bf16"):
        layer = make_layer(config(losses=BalanceLossConfig()))
        mesh = make_mesh(ParallelConfig(ep_size=2, payload=payload), 4)  # type: ignore[arg-type]
        apply_expert_parallel(layer, mesh)
        with listen() as sent:
            layer(tokens_of_all([7, 5])[mesh.rank].requires_grad_())[0].sum().backward()
        seen.append([m.bytes for m in sent if m.operation == "all_to_all"])
    return seen[0], seen[1]


def test_a_light_payload_is_light_in_both_directions(pool2: Pool) -> None:
    for whole, light in pool2.run(light_bytes):
        assert len(whole) == 4 and sum(whole) > 0
        assert light == [sent / 4 for sent in whole]


def frozen_weights() -> tuple[bool, bool, bool]:
    """Weights travel and fc1 is frozen: no gradient of it is computed; and gathered weights die when recomputed."""
    layer = make_layer(config())
    mesh = make_mesh(ParallelConfig(ep_size=2, weight_group=2), 4)
    apply_expert_parallel(layer, mesh)
    layer.experts.fc1_weight.requires_grad_(False)
    gathered: list[Any] = []
    function = layer.experts.function

    def watching(training: bool) -> Any:
        def run(rows: Tensor, segments: Tensor | None, weights: Any) -> Tensor:
            gathered.append((weakref.ref(weights.fc2), weights.fc1.requires_grad, weights.fc2.requires_grad))
            return function(training)(rows, segments, weights)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer.experts, "function", watching)
        x = tokens_of_all([5, 3])[mesh.rank].requires_grad_()
        assigned = layer.assign(x, None)
        with set_checkpoint_early_stop(False):
            y = checkpoint(lambda tokens: layer.carry(tokens, *assigned[:3]), x, use_reentrant=False)
        gc.collect()
        alive = gathered[0][0]() is not None
        y.sum().backward()
    assert layer.experts.fc1_weight.grad is None and layer.experts.fc2_weight.grad is not None
    return gathered[0][1], gathered[0][2], alive


def test_frozen_weights_cost_no_gradient_and_recomputed_ones_no_memory(pool2: Pool) -> None:
    assert pool2.run(frozen_weights) == [(False, True, False)] * 2


def traffic(layout: str, num_experts: int, parallel: ParallelConfig, counts: list[int]) -> dict[str, Any]:
    """Messages of one forward and one backward pass, and the closed form of what they should be."""
    cfg = config(num_experts=num_experts, dispatcher=layout, top_k=min(2, num_experts), losses=BalanceLossConfig())
    layer = make_layer(cfg)
    mesh = make_mesh(parallel, num_experts)
    apply_expert_parallel(layer, mesh)
    x = tokens_of_all(counts)[mesh.rank].requires_grad_()
    weights = sum(p.nbytes for p in layer.experts.parameters())
    with listen() as forward:
        y, stats = layer(x)
    with listen() as backward:
        y.sum().backward()
    # What the ranks told each other, found out once more in another way.
    matrix = all_gather_rows(stats.kept, mesh.ep_group).view(mesh.ep_size, -1)
    if layout == "padded":
        matrix = torch.full_like(matrix, int(matrix.max()))
    return {
        "forward": [(m.operation, m.bytes) for m in forward],
        "backward": [(m.operation, m.bytes) for m in backward],
        "matrix": matrix,
        "rank": mesh.ep_rank,
        "weights": weights,
    }


def remote_rows(matrix: Tensor, rank: int, size: int) -> tuple[Tensor, Tensor]:
    """(E,) rows of `rank` that go to each expert, and (copies, E) the rank that each copy of them goes to."""
    experts = matrix.shape[1]
    copies = max(1, size // experts)
    owners = torch.arange(experts) * copies if copies > 1 else torch.arange(experts) // (experts // size)
    return matrix[rank], owners + torch.arange(copies).unsqueeze(1)


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize(("num_experts", "chunks"), [(8, 1), (8, 2), (2, 1), (2, 3)])
def test_a_flat_exchange_sends_remote_rows_and_nothing_else(
    pool4: Pool, layout: str, num_experts: int, chunks: int
) -> None:
    """One message of metadata, 2·C exchanges forward, 2·C backward; Σ over other ranks of rows·D·8 bytes each way."""
    for seen in pool4.run(traffic, layout, num_experts, ParallelConfig(ep_size=4, chunks=chunks), [5, 0, 8, 3]):
        rank, matrix = seen["rank"], seen["matrix"]
        rows, owners = remote_rows(matrix, rank, 4)
        out = int((rows * (owners != rank)).sum()) * DIM * 8
        # Rows of other ranks that were here go home.
        home = (
            sum(int((remote_rows(matrix, s, 4)[0] * (owners == rank)).sum()) for s in range(4) if s != rank) * DIM * 8
        )
        if layout == "padded" and num_experts == 8:
            assert out == home == matrix.numel() // 4 * int(matrix[0, 0]) * DIM * 8 * 3 // 4  # E·C·D·b·(W-1)/W
        metadata, *exchanges = seen["forward"]
        assert metadata == (("all_gather", 3 * num_experts * 8) if layout == "ragged" else ("all_reduce", 12.0))
        for way in (exchanges, seen["backward"]):
            assert [operation for operation, _ in way] == ["all_to_all"] * 2 * chunks
            assert sum(sent for _, sent in way) == out + home


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("num_experts", [12, 2])
@pytest.mark.parametrize("local_size", [2, 3])
def test_two_stages_send_rows_that_change_local_rank_plus_rows_that_change_node(
    pool6: Pool, layout: str, num_experts: int, local_size: int
) -> None:
    parallel = ParallelConfig(ep_size=6, exchange="2dh", local_size=local_size)
    results = pool6.run(traffic, layout, num_experts, parallel, [5, 0, 8, 3, 1, 4])
    moved = 0
    for seen in results:
        rows, owners = remote_rows(seen["matrix"], seen["rank"], 6)
        moved += int((rows * (owners % local_size != seen["rank"] % local_size)).sum())
        moved += int((rows * (owners // local_size != seen["rank"] // local_size)).sum())
        assert [operation for operation, _ in seen["forward"][1:]] == ["all_to_all"] * 4
        assert [operation for operation, _ in seen["backward"]] == ["all_to_all"] * 4
    # A rank also passes on what its neighbours send, so only the sum over ranks has a simple form.
    for way in ([s["forward"][1:] for s in results], [s["backward"] for s in results]):
        assert sum(sent for messages in way for _, sent in messages) == 2 * moved * DIM * 8


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("num_experts", [8, 2])
def test_travelling_weights_are_sent_once_each_way(pool4: Pool, layout: str, num_experts: int) -> None:
    parallel = ParallelConfig(ep_size=4, weight_group=4)
    for seen in pool4.run(traffic, layout, num_experts, parallel, [5, 0, 8, 3]):
        assert seen["forward"] == [("all_gather", 3 * seen["weights"])]
        assert seen["backward"] == [("reduce_scatter", 3 * seen["weights"])]


def copied_layer() -> bool:
    layer = make_layer(config())
    mesh = make_mesh(ParallelConfig(ep_size=2), 4)
    apply_expert_parallel(layer, mesh)
    twin = copy.deepcopy(layer)
    x = tokens_of_all([4, 2])[mesh.rank]
    with torch.no_grad():
        same = torch.equal(layer.eval()(x)[0], twin.eval()(x)[0])
    return same and expert_parameter_names(twin) == expert_parameter_names(layer) != set()


def test_a_deep_copy_stays_spread_and_shares_the_groups(pool2: Pool) -> None:
    assert pool2.run(copied_layer) == [True, True]


def refusals() -> list[str]:
    """Messages of what `make_mesh` and `apply_expert_parallel` refuse, on every rank alike."""
    messages = []
    mesh = make_mesh(ParallelConfig(ep_size=2), 4)
    layer = make_layer(config())
    apply_expert_parallel(layer, mesh)
    for attempt in (
        lambda: make_mesh(ParallelConfig(ep_size=4), 8),
        lambda: apply_expert_parallel(layer, mesh),
        lambda: apply_expert_parallel(make_layer(config(num_experts=5)), mesh),
        lambda: apply_expert_parallel(
            make_layer(config(num_experts=1, experts=ExpertConfig(hidden_ratio=0.875))), mesh
        ),
        lambda: use_exchange(layer, mesh, ParallelConfig(ep_size=1)),
    ):
        try:
            attempt()
        except ConfigError as error:
            messages.append(str(error))
    return messages


def test_what_does_not_divide_is_refused(pool2: Pool) -> None:
    for processes, twice, experts, width, move in pool2.run(refusals):
        assert "ep_size=4 does not divide the number of processes 2; use one of [1, 2]" in processes
        assert "spread over processes already" in twice
        assert "ep_size=2 does not divide the experts of layer ''=5" in experts
        assert "fc1_weight has 21 along its axis 1, which cannot be cut into 2 equal slices" in width
        assert "ep_size=1 would move experts" in move
