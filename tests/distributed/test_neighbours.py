"""Exchange through shared memory: the same rows as over the network, however ranks interleave, end or fall behind."""

from __future__ import annotations

import atexit
import os
import random
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import Pool, PoolError
from test_all_to_all import EMPTY_SENDER_4, UNEVEN_2, exchange

from swinmoe.comm import (
    all_gather_rows,
    all_reduce_max,
    all_reduce_min,
    all_reduce_sum,
    all_to_all_rows,
    neighbours,
    start,
    wait,
)
from swinmoe.comm.arrangement import by_expert
from swinmoe.errors import CollectiveError

pytestmark = pytest.mark.distributed


def apart(counts: list[list[int]], groups: list[list[int]]) -> tuple[bool, bool]:
    """`exchange` with shared memory switched off."""
    with neighbours.switched_off():
        return exchange(counts, groups, torch.float64, True)


def test_over_the_network_too(pool4: Pool) -> None:
    assert pool4.run(apart, EMPTY_SENDER_4, [[0, 1, 2, 3]]) == [(True, True)] * 4
    assert pool4.run(apart, UNEVEN_2, [[0, 2], [1, 3]]) == [(True, True)] * 4


def there_and_back(counts: list[list[list[int]]], by_network: bool) -> tuple[bool, bool]:
    """Rows put by expert where they arrive, gone back from there, and gradients the other way: whether what arrived was
    sorted by (expert, source), and whether all came back to its place. counts[source][receiver] is by expert."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sends = [sum(to) for to in counts[rank]]
    receives = [sum(source[rank]) for source in counts]
    with neighbours.switched_off() if by_network else nullcontext():
        group = dist.new_group(list(range(world)))
        assert (neighbours.link_of(group) is None) is by_network
        arrangement = by_expert(torch.tensor([source[rank] for source in counts]), world)
        owner = [expert for to in counts[rank] for expert, count in enumerate(to) for _ in range(count)]
        rows = torch.tensor([[float(expert), rank, n] for n, expert in enumerate(owner)]).view(-1, 3).requires_grad_()
        arrived = wait(start(rows, sends, receives, group, arriving=arrangement))
        ordered = arrived.tolist() == sorted(arrived.tolist())
        back = wait(start(2 * arrived, receives, sends, group, leaving=arrangement))
        (back * rows.detach()).sum().backward()
    assert rows.grad is not None
    return ordered, torch.equal(back, 2 * rows) and torch.equal(rows.grad, 2 * rows.detach())


@pytest.mark.parametrize("by_network", [False, True])
def test_rows_stand_by_expert_and_leave_from_there(pool2: Pool, pool4: Pool, by_network: bool) -> None:
    draw = random.Random(3)
    for pool, world in ((pool2, 2), (pool4, 4)):
        counts = [[[draw.choice([0, 1, 5]) for _ in range(3)] for _ in range(world)] for _ in range(world)]
        assert pool.run(there_and_back, counts, by_network) == [(True, True)] * world


def small_numbers(by_network: bool) -> list[object]:
    """Gathers, sums and maxima of few numbers, and of more than go the short way."""
    rank = dist.get_rank()
    with neighbours.switched_off() if by_network else nullcontext():
        group = dist.new_group(list(range(dist.get_world_size())))
        x = torch.tensor([[1.5, rank]], dtype=torch.float64, requires_grad=True)
        gathered = all_gather_rows(x, group)
        total = all_reduce_sum(x, group)
        total.sum().backward()
        assert x.grad is not None
        counts = [all_reduce_sum(torch.tensor(rank + 1, dtype=dtype), group) for dtype in (torch.int32, torch.bfloat16)]
        most = all_reduce_max(torch.tensor([-rank, rank]), group)
        least = all_reduce_min(torch.tensor([rank + 1, 255 - rank], dtype=torch.uint8), group)
        none = all_reduce_sum(torch.zeros(0), group)
        many = all_reduce_sum(torch.full((neighbours.SMALLEST,), float(rank)), group)
        short = [neighbours.gather_small(torch.zeros(n), group) is not None for n in (1, neighbours.SMALLEST, 0)]
        assert short == ([False] * 3 if by_network else [True, False, False])
    same = [(t.dtype, t.tolist()) for t in (*counts, most, least, none)]
    return [gathered.tolist(), total.tolist(), x.grad.tolist(), same, many.unique().tolist()]


@pytest.mark.parametrize("by_network", [False, True])
def test_few_numbers_go_the_short_way(pool4: Pool, by_network: bool) -> None:
    counts = [(torch.int32, 10), (torch.bfloat16, 10.0), (torch.int64, [0, 3])]
    counts += [(torch.uint8, [1, 252]), (torch.float32, [])]
    everyone = [[1.5, float(rank)] for rank in range(4)]
    assert pool4.run(small_numbers, by_network) == [[everyone, [[6.0, 6.0]], [[1.0, 1.0]], counts, [6.0]]] * 4


def row(source: int, receiver: int, turn: int, number: int) -> list[float]:
    return [1000 * source + receiver, turn, number]


def many_turns(turns: int, under_way: int) -> int:
    """Exchanges of random sizes, several under way, ranks now and then late. The number of wrong ones."""
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(world)))
    assert neighbours.link_of(group) is not None, "these processes share a host"
    sizes, own = random.Random(7), random.Random(rank)
    flight, wrong = [], 0
    for turn in range(turns):
        most = sizes.choice([0, 1, 3, 40, 3000])
        counts = [[sizes.randint(0, most) for _ in range(world)] for _ in range(world)]
        rows = [row(rank, to, turn, n) for to in range(world) for n in range(counts[rank][to])]
        sent = torch.tensor(rows, dtype=torch.float32).view(-1, 3)
        receives = [counts[source][rank] for source in range(world)]
        flight.append((turn, counts, sent, start(sent, counts[rank], receives, group)))
        if own.random() < 0.1:
            time.sleep(own.random() * 0.01)
        if len(flight) == under_way:
            sizes.shuffle(flight)  # waited for in another order than begun
            while flight:
                begun, told, kept, pending = flight.pop()
                want = [row(s, rank, begun, n) for s in range(world) for n in range(told[s][rank])]
                wrong += not torch.equal(wait(pending), torch.tensor(want, dtype=torch.float32).view(-1, 3))
                kept.fill_(-1)  # what was sent is the sender's again
    return wrong


@pytest.mark.parametrize("under_way", [1, 5])
def test_many_turns(pool4: Pool, under_way: int) -> None:
    assert pool4.run(many_turns, 200, under_way) == [0] * 4


def every_place_in_use() -> bool:
    """As many under way as the ring has places, and round it again."""
    before, neighbours.UNDER_WAY = neighbours.UNDER_WAY, 8
    try:
        group, me = dist.new_group([0, 1]), dist.get_rank()
        swap = [0, 1] if me == 0 else [1, 0]
        good = True
        for turn in range(3):
            pending = [start(torch.full((1, 1), 100.0 * me + 10 * turn + i), swap, swap, group) for i in range(8)]
            good = good and [float(wait(p)) for p in pending] == [100.0 * (1 - me) + 10 * turn + i for i in range(8)]
        return good
    finally:
        neighbours.UNDER_WAY = before


def test_every_place_in_use(pool2: Pool) -> None:
    assert pool2.run(every_place_in_use) == [True] * 2


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def opened_and_forgotten() -> tuple[int, int]:
    """Files open before and after groups that exchanged rows of growing sizes and went away."""
    counts = []
    for _ in range(4):
        group = dist.new_group([0, 1])
        for size in (10, 10**5, 10**6):
            all_to_all_rows(torch.ones(2 * size, 1), [size, size], [size, size], group)
        link = neighbours.link_of(group)
        assert link is not None and len(link._buffers) <= 2, "buffers are used again"
        dist.destroy_process_group(group)
        del group, link
        counts.append(open_files())
    return counts[1], counts[3]


def test_nothing_stays_open(pool2: Pool) -> None:
    for before, after in pool2.run(opened_and_forgotten):
        assert before == after


def given_back() -> int:
    """Buffers after many exchanges that were begun and never waited for."""
    group, me = dist.new_group([0, 1]), dist.get_rank()
    swap = [0, 1] if me == 0 else [1, 0]
    for _ in range(2 * neighbours.UNDER_WAY):
        start(torch.zeros(1, 1), swap, swap, group)
        dist.barrier()
    link = neighbours.link_of(group)
    assert link is not None
    return len(link._buffers)


def test_who_begins_and_never_waits_gives_buffers_back(pool2: Pool) -> None:
    assert max(pool2.run(given_back)) <= 2


def told_different_counts() -> str:
    group, me = dist.new_group([0, 1], timeout=timedelta(seconds=5)), dist.get_rank()
    swap = [0, 1] if me == 0 else [1, 0]
    other = swap if me == 0 else [2, 0]
    try:
        all_to_all_rows(torch.zeros(1, 1), swap, other, group, "layer 3")
        all_to_all_rows(torch.zeros(1, 1), swap, swap, group, "layer 4")
    except (RuntimeError, CollectiveError) as error:
        return str(error)
    return "nothing wrong"


def test_ranks_that_disagree_on_what_is_sent(pool2: Pool) -> None:
    first, second = pool2.run(told_different_counts)
    assert "layer 4 did not finish (connection closed: rank 1 of the group gave up" in first
    assert "layer 3 failed (rank 0 of the group sends 1 rows of 4 bytes, where 2 of 4 were expected)" in second


def ends_on_an_exchange(folder: str) -> None:
    """Rank 0 leaves at once; rank 1 comes later for what it left behind, in a file it has not opened."""
    group, me = dist.new_group([0, 1]), dist.get_rank()
    x = torch.full((10**5, 1), float(me))
    swap = [0, 10**5] if me == 0 else [10**5, 0]
    pending = start(x, swap, swap, group)
    if me == 1:
        time.sleep(1)
        Path(folder, "sum").write_text(str(float(wait(pending).sum())))
    else:
        wait(pending)
        atexit._run_exitfuncs()  # what the end of a process does; those of a fork server skip it
        os._exit(0)


def test_what_was_sent_arrives_though_its_sender_ends(tmp_path: Path) -> None:
    pool = Pool(2)
    with pytest.raises(PoolError):  # rank 0 gives no answer
        pool.run(ends_on_an_exchange, str(tmp_path), timeout=20.0)
    assert (tmp_path / "sum").read_text() == "0.0"


def left_waiting() -> str:
    """Rank 1 comes to a first exchange, and to a second one too late."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    swap = [0, 1] if dist.get_rank() == 0 else [1, 0]
    all_to_all_rows(torch.zeros(1, 1), swap, swap, group)
    if dist.get_rank() == 1:
        time.sleep(3)
    try:
        all_to_all_rows(torch.zeros(1, 1), swap, swap, group, "layer 3: sending tokens")
        all_to_all_rows(torch.zeros(1, 1), swap, swap, group, "layer 3: returning tokens")
    except CollectiveError as error:
        return str(error)
    return "nothing wrong"


def test_a_rank_that_does_not_come_is_given_up_and_told(pool2: Pool) -> None:
    first, second = pool2.run(left_waiting)
    assert "rank 0: layer 3: sending tokens did not finish (timed out after 1." in first
    assert "rank 1: layer 3: returning tokens did not finish (connection closed: rank 0 of the group gave up" in second


def dies_or_waits(at_once: bool) -> str:
    """In a process of its own, rank 1 ends without a word, maybe before anyone has taken what it sent last."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=60))
    swap = [0, 1] if dist.get_rank() == 0 else [1, 0]
    all_to_all_rows(torch.zeros(1, 1), swap, swap, group)
    dist.barrier()
    if dist.get_rank() == 1:
        if at_once:
            x = torch.zeros(10**6, 1)  # in a file that nobody has opened yet
            start(x, [10**6, 0], [10**6, 0], group)
        os._exit(9)
    if at_once:
        time.sleep(1)
        swap = [0, 10**6]
    began = time.monotonic()
    try:
        all_to_all_rows(torch.zeros(sum(swap), 1), swap, swap, group, "layer 3")
    except CollectiveError as error:
        raise AssertionError(f"{error} after {time.monotonic() - began:.0f} s") from None
    return "nothing wrong"


@pytest.mark.parametrize("at_once", [False, True])
def test_a_rank_that_died_is_noticed_long_before_the_timeout(at_once: bool) -> None:
    pool = Pool(2)
    with pytest.raises(PoolError, match=r"layer 3 did not finish \(connection closed.*has ended.* after [0-5] s"):
        pool.run(dies_or_waits, at_once, timeout=40.0)


def pretended_hosts(number: int) -> bool:
    """Whether memory is shared where this rank believes to be on host `number` or rank 0's, as its rank has it."""
    before = neighbours._host
    neighbours._host = lambda: [5, number * dist.get_rank(), 5]
    try:
        return neighbours.link_of(dist.new_group([0, 1])) is not None
    finally:
        neighbours._host = before


def test_shared_by_one_host_alone(pool2: Pool) -> None:
    assert pool2.run(pretended_hosts, 0) == [True, True]
    assert pool2.run(pretended_hosts, 1) == [False, False]


def unseen() -> bool:
    """Rank 1 cannot open what others have."""
    opened = os.open

    def refuse(path: str, *arguments: int) -> int:
        if dist.get_rank() == 1 and "/fd/" in str(path):
            raise PermissionError(path)
        return opened(path, *arguments)

    os.open = refuse
    try:
        group = dist.new_group([0, 1])
        swap = [0, 1] if dist.get_rank() == 0 else [1, 0]
        arrived = all_to_all_rows(torch.full((1, 1), float(dist.get_rank())), swap, swap, group)
        return float(arrived) == 1 - dist.get_rank() and neighbours.link_of(group) is None
    finally:
        os.open = opened


def test_all_go_over_the_network_where_one_sees_nothing(pool2: Pool) -> None:
    assert pool2.run(unseen) == [True, True]


def refused_a_file() -> bool:
    """Rank 1 may not make one."""
    make = os.memfd_create

    def refuse(*arguments: object) -> int:
        raise PermissionError("memfd_create")

    if dist.get_rank() == 1:
        os.memfd_create = refuse
    try:
        return neighbours.link_of(dist.new_group([0, 1])) is None
    finally:
        os.memfd_create = make


def test_all_go_over_the_network_where_one_has_no_memory_to_share(pool2: Pool) -> None:
    assert pool2.run(refused_a_file) == [True, True]
