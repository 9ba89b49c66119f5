"""The exchange against a permutation computed without any communication: forward, backward, groups, odd counts."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch import Tensor

from swinmoe.comm import all_reduce_sum, all_to_all_rows, start, wait

pytestmark = pytest.mark.distributed

UNEVEN_2 = [[3, 1], [0, 5]]
EMPTY_SENDER_4 = [[1, 2, 0, 4], [0, 0, 0, 0], [2, 0, 3, 1], [5, 1, 1, 0]]
NOTHING_4 = [[0] * 4 for _ in range(4)]


def rows_of(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    """(count, 3), a different value in each place of each rank."""
    return (torch.arange(count * 3, dtype=dtype).reshape(count, 3) + 100 * rank + 1) / 8


def permuted(blocks: list[list[Tensor]], receiver: int) -> Tensor:
    """What `receiver` gets when `blocks[source][destination]` are sent."""
    return torch.cat([blocks[source][receiver] for source in range(len(blocks))])


def exchange(counts: list[list[int]], groups: list[list[int]], dtype: torch.dtype, split: bool) -> tuple[bool, bool]:
    """Within each group send by `counts`; whether the received rows and the gradient are those of a permutation."""
    rank = dist.get_rank()
    handles = [dist.new_group(ranks) for ranks in groups]
    mine = next(i for i, ranks in enumerate(groups) if rank in ranks)
    ranks, me = groups[mine], groups[mine].index(rank)
    transposed = [list(column) for column in zip(*counts, strict=True)]
    rows = rows_of(rank, sum(counts[me]), dtype).requires_grad_()
    if split:
        pending = start(rows, counts[me], transposed[me], handles[mine])
        received = wait(pending)
    else:
        received = all_to_all_rows(rows, counts[me], transposed[me], handles[mine])
    sent = [rows_of(r, sum(counts[i]), dtype).split(counts[i]) for i, r in enumerate(ranks)]
    forward = torch.equal(received, permuted([list(s) for s in sent], me))
    # The loss weighs every received number differently: the gradient of a row is the weight its receiver gave it.
    weights = [rows_of(r + 50, sum(transposed[i]), dtype) for i, r in enumerate(ranks)]
    (received * weights[me]).sum().backward()
    returned = [list(w.split(transposed[i])) for i, w in enumerate(weights)]
    assert rows.grad is not None
    return forward, torch.equal(rows.grad, permuted(returned, me))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_two_ranks_with_uneven_counts(pool2: Pool, dtype: torch.dtype) -> None:
    assert pool2.run(exchange, UNEVEN_2, [[0, 1]], dtype, True) == [(True, True)] * 2


@pytest.mark.parametrize("counts", [EMPTY_SENDER_4, NOTHING_4])
def test_four_ranks_with_empty_ones(pool4: Pool, counts: list[list[int]]) -> None:
    assert pool4.run(exchange, counts, [[0, 1, 2, 3]], torch.float64, False) == [(True, True)] * 4


@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[0, 2], [1, 3]]])
def test_subgroups_keep_to_themselves_in_both_directions(pool4: Pool, groups: list[list[int]]) -> None:
    assert pool4.run(exchange, UNEVEN_2, groups, torch.float64, True) == [(True, True)] * 4


def overlapped() -> tuple[bool, bool]:
    """Two exchanges under way at once, waited for in the opposite order, with computation between."""
    rank, other = dist.get_rank(), 1 - dist.get_rank()
    x = rows_of(rank, 4, torch.float64).requires_grad_()
    swap = ([0, 4], [0, 4]) if rank == 0 else ([4, 0], [4, 0])
    first = start(x, *swap, dist.group.WORLD)
    second = start(2 * x, *swap, dist.group.WORLD)
    here = x.square().sum()
    total = wait(second).sum() + 3 * wait(first).sum() + here
    theirs = rows_of(other, 4, torch.float64)
    value = 5 * theirs.sum() + x.detach().square().sum()
    total.backward()
    assert x.grad is not None
    return torch.equal(total.detach(), value), torch.equal(x.grad, 2 * x.detach() + 5)


def test_several_exchanges_may_be_under_way(pool2: Pool) -> None:
    assert pool2.run(overlapped) == [(True, True)] * 2


def graph_twice() -> bool:
    """A second backward pass through a retained graph exchanges again."""
    rank = dist.get_rank()
    x = rows_of(rank, 2, torch.float64).requires_grad_()
    y = (all_to_all_rows(x, [1, 1], [1, 1], dist.group.WORLD) * (rank + 1)).sum()
    (one,) = torch.autograd.grad(y, x, retain_graph=True)
    (two,) = torch.autograd.grad(y, x)
    return torch.equal(one, two) and torch.equal(one, torch.tensor([[1.0] * 3, [2.0] * 3], dtype=torch.float64))


def test_a_retained_graph_can_be_used_again(pool2: Pool) -> None:
    assert pool2.run(graph_twice) == [True, True]


def statistics_sum() -> tuple[float, float, int]:
    rank = dist.get_rank()
    x = torch.tensor([rank + 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    total = all_reduce_sum(x, dist.group.WORLD)
    (total[0] ** 2 / 2).backward()
    assert x.grad is not None
    return float(total.detach().sum()), float(x.grad[0]), int(all_reduce_sum(torch.tensor(rank + 1), dist.group.WORLD))


def test_a_sum_over_ranks_has_the_identity_as_its_backward(pool2: Pool) -> None:
    # S = 1 + 2 = 3; dL/dS = 3 reaches each rank once, not once per rank.
    assert pool2.run(statistics_sum) == [(7.0, 3.0, 3)] * 2
