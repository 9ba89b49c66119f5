"""One expert layer spread over ranks against the same layer on one process: outputs, every gradient, losses, traffic.

The oracle holds all experts, runs in the same process, and sees the tokens of all ranks.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch import Tensor

import swinmoe.parallel.execution
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
from swinmoe.moe import MoEMlp
from swinmoe.parallel import (
    apply_expert_parallel,
    expert_parameter_names,
    gather_full,
    global_sum,
    make_mesh,
    sync_expert_gradients,
    take_local,
)

pytestmark = pytest.mark.distributed

DIM, HIDDEN = 6, 10
TOLERANCE = 1e-10
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


def compare_with_oracle(cfg: MoEConfig, counts: list[int], ep_size: int) -> dict[str, float]:
    """Largest differences, each over the oracle's largest value (at least 1)."""
    mesh = make_mesh(ParallelConfig(ep_size=ep_size), cfg.num_experts)
    oracle = make_layer(cfg)
    spread = copy.deepcopy(oracle)
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

    x = everyone[mesh.rank].clone().requires_grad_()
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
    assert names == ({n for n, _ in oracle.named_parameters() if n.startswith("experts.")} if ep_size > 1 else set())
    for (name, found), (_, expected) in zip(spread.named_parameters(), oracle.named_parameters(), strict=True):
        assert found.grad is not None and expected.grad is not None, name
        gradient = found.grad if name in names else global_sum(found.grad, mesh)
        result[name] = difference(gradient, take_local(expected.grad, found, mesh))
        result[f"{name} gathered"] = (
            difference(gather_full(found.grad, found, mesh), expected.grad) if name in names else 0
        )
        assert torch.equal(gather_full(found, found, mesh), expected)
    if cfg.capacity.train.kind != "dropless":
        result["drops"] = -float(sum(r.routed.sum() - r.kept.sum() for r in reports))  # type: ignore[arg-type]
    return result


def check(results: list[dict[str, float]], drops: bool = False) -> None:
    for rank, result in enumerate(results):
        if drops:
            assert result.pop("drops") < 0, "the case was meant to drop tokens"
        worst = max(result, key=lambda name: result[name])
        assert result[worst] <= TOLERANCE, f"rank {rank}: {worst} is off by {result[worst]:.2e}"


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("counts", [[7, 12], [0, 9], [0, 0], [1, 1]])
def test_dropless_equals_one_process(pool2: Pool, layout: str, top_k: int, counts: list[int]) -> None:
    check(pool2.run(compare_with_oracle, config(dispatcher=layout, top_k=top_k), counts, 2))


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
    check(pool2.run(compare_with_oracle, cfg, [9, 16], 2), drops=True)


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_four_ranks_in_every_mesh(pool4: Pool, layout: str, ep_size: int) -> None:
    cfg = config(num_experts=8, dispatcher=layout, top_k=2)
    check(pool4.run(compare_with_oracle, cfg, [5, 0, 8, 3], ep_size))


@pytest.mark.parametrize("expert", ["gelu", "swiglu"])
def test_other_layers_spread_too(pool2: Pool, expert: str) -> None:
    cfg = config(
        router=RouterConfig(type="cosine", proj_dim=4, normalize_gates=True),
        experts=ExpertConfig(type=expert, hidden_ratio=0.5),
        shared_expert_ratio=0.5,
        top_k=2,
    )
    check(pool2.run(compare_with_oracle, cfg, [6, 5], 2))


def traffic(layout: str) -> tuple[dict[str, int], dict[str, int]]:
    """Collectives of one forward and one backward pass."""
    cfg = config(dispatcher=layout, losses=BalanceLossConfig())
    layer = make_layer(cfg)
    apply_expert_parallel(layer, make_mesh(ParallelConfig(ep_size=2), 4))
    calls: Counter[str] = Counter()

    def counting(owner: Any, name: str) -> Any:
        genuine = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return genuine(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (dist, "all_to_all_single"),
            (dist, "all_reduce"),
            (swinmoe.parallel.execution, "all_gather_rows"),
        ):
            patch.setattr(owner, name, counting(owner, name))
        y, _ = layer(tokens_of_all([5, 3])[dist.get_rank()].requires_grad_())
        forward = dict(calls)
        calls.clear()
        y.sum().backward()
    return forward, dict(calls)


@pytest.mark.parametrize(("layout", "metadata"), [("ragged", "all_gather_rows"), ("padded", "all_reduce")])
def test_a_layer_costs_one_metadata_call_and_two_exchanges_each_way(pool2: Pool, layout: str, metadata: str) -> None:
    for forward, backward in pool2.run(traffic, layout):
        assert forward == {metadata: 1, "all_to_all_single": 2}
        assert backward == {"all_to_all_single": 2}


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
    ):
        try:
            attempt()
        except ConfigError as error:
            messages.append(str(error))
    return messages


def test_what_does_not_divide_is_refused(pool2: Pool) -> None:
    for processes, twice, experts in pool2.run(refusals):
        assert "ep_size=4 does not divide the number of processes 2; use one of [1, 2]" in processes
        assert "spread over processes already" in twice
        assert "does not divide the 5 experts of layer" in experts
