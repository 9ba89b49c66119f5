"""Every way to spread experts against one process, two by two; and breaks of the code, which the proof must notice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cover import AXES, SIX, Cell, has_meaning, pairwise, run_of
from pool import Pool

import swinmoe.comm.all_to_all
import swinmoe.parallel.data_parallel
import swinmoe.train.arm
from swinmoe.verify import ParallelProof, verify_parallel

pytestmark = pytest.mark.distributed

FULL = bool(os.environ.get("SWINMOE_FULL"))
STEPS = 10
COVER, CANDIDATES = pairwise(AXES, together=("spread", "travel", "layout"))
"""Every way to travel on every mesh with either layout, and every two choices of all."""
COVER_OF_SIX, _ = pairwise(SIX)
FEW = 5
"""Cells on six processes in the default run: the first of a greedy cover hold the most pairs."""


def prove(cell: Cell) -> ParallelProof:
    return verify_parallel(run_of(cell), steps=STEPS)


def prove_single(cell: Cell) -> ParallelProof:
    """In float32, which is reported and proves nothing."""
    return verify_parallel(run_of(cell), steps=2, dtype=torch.float32)


def check(cell: Cell, answers: list[ParallelProof]) -> None:
    proof, *others = answers
    assert all(other == proof for other in others), "ranks do not agree on the proof"
    assert proof.proven, (str(cell), proof.failures)
    assert proof.tolerance == 1e-9 and proof.bit_equal
    assert proof.processes == cell.processes
    # Lengths and precision of the proof itself; nothing of the model, the mesh or the losses.
    assert all(note.startswith(("train.precision=", "train.batch_size=")) for note in proof.set_aside), proof.set_aside
    assert (proof.dropped > 0) == cell.drops, (proof.dropped, proof.routed)
    assert 0 < proof.clip_factor <= proof.largest_clip_factor < 1, "a step was not clipped"


def test_the_cover_is_large_and_complete() -> None:
    assert len(COVER) >= 60 and len(set(COVER)) == len(COVER)
    assert {cell.processes for cell in COVER} == {1, 2, 4}
    met = {pair for cell in COVER for pair in _pairs(cell)}
    some = [cell for cell in _every_seventh(AXES) if has_meaning(cell)]
    assert len(some) > 300 and all(pair in met for cell in some for pair in _pairs(cell))
    assert _size(AXES) > 2 * CANDIDATES, "the config refuses nothing"
    mesh = {(cell.spread, cell.travel, cell.layout) for cell in some}
    assert mesh <= {(cell.spread, cell.travel, cell.layout) for cell in COVER}
    words = [" ".join(cell.columns()) for cell in (*COVER, *COVER_OF_SIX)]
    for said in ("weights", "both by 2", "2DH 2x3", "2DH 3x2", "tokens padded flat fixed", "both by 3"):
        assert any(said in cell for cell in words), said


def test_two_stages_are_two_and_meet_everything() -> None:
    """A node of one rank, or one node, is a flat exchange by another name: none of it is counted."""
    four, six = ([cell for cell in cells if cell.two_stages] for cells in (COVER, COVER_OF_SIX))
    for cell in four + six:
        parallel = run_of(cell).parallel
        assert parallel.exchange == "2dh" and parallel.local_size is not None
        per_node = parallel.local_size // parallel.weight_group
        assert per_node > 1 and parallel.token_group // per_node > 1, str(cell)
    assert len(four) >= 16 and len(six) >= 12
    assert {(cell.travel[2], cell.training) for cell in four} == {
        (chunks, training) for chunks in (1, 2) for training in ("clip", "accumulation", "checkpointing")
    }


def _pairs(cell: Cell) -> list[Any]:
    choices = list(vars(cell).items())
    return [(a, b) for i, a in enumerate(choices) for b in choices[i + 1 :]]


def _size(axes: dict[str, Any]) -> int:
    size = 1
    for choices in axes.values():
        size *= len(choices)
    return size


def _every_seventh(axes: dict[str, Any]) -> Iterator[Cell]:
    for number in range(0, _size(axes), 7):
        choice = {}
        for axis, choices in axes.items():
            number, place = divmod(number, len(choices))
            choice[axis] = choices[place]
        yield Cell(**choice)


@pytest.mark.parametrize("cell", [c for c in COVER if c.processes == 1], ids=str)
def test_one_process(cell: Cell) -> None:
    check(cell, [prove(cell)])


@pytest.mark.parametrize("cell", [c for c in COVER if c.processes == 2], ids=str)
def test_two_processes(pool2: Pool, cell: Cell) -> None:
    check(cell, pool2.run(prove, cell))


@pytest.mark.parametrize("cell", [c for c in COVER if c.processes == 4], ids=str)
def test_four_processes(pool4: Pool, cell: Cell) -> None:
    check(cell, pool4.run(prove, cell))


@pytest.mark.parametrize("cell", COVER_OF_SIX if FULL else COVER_OF_SIX[:FEW], ids=str)
def test_nodes_that_are_not_square(pool6: Pool, cell: Cell) -> None:
    check(cell, pool6.run(prove, cell))


# ----------------------------------------------------------------------------------------------------------- the breaks


SQUARE = Cell((4, 2, 4), ("tokens", None, 1), "padded", "fixed", "clip", 1, "global")
"""Two replicas of two ranks: sub-groups, and replicas to be summed."""


def whole_world_in_backward() -> tuple[Any, str, Callable[..., Any]]:
    """Tutel's: the reverse exchange forgets its group. With equal splits nothing hangs and nothing complains."""
    launch = swinmoe.comm.all_to_all._Hop.launch

    def forgetful(self: Any, rows: torch.Tensor, *, back: bool = False) -> None:
        if not back:
            return launch(self, rows)
        world, genuine = dist.get_world_size(), dict(vars(self))
        self.group, self.leaving, self.arriving = dist.group.WORLD, None, None
        self.ins, self.outs = [sum(self.ins) // world] * world, [sum(self.outs) // world] * world
        try:
            launch(self, rows, back=True)
        finally:
            vars(self).update({name: genuine[name] for name in genuine if name != "_flight"})

    return swinmoe.comm.all_to_all._Hop, "launch", forgetful


def mean_of_dense_gradients() -> tuple[Any, str, Callable[..., Any]]:
    """DDP's own: divided by the number of ranks."""
    hook = swinmoe.parallel.data_parallel._sum_bucket

    def mean(group, bucket):  # type: ignore[no-untyped-def]
        return hook(group, bucket).then(lambda done: done.value() / group.size())

    return swinmoe.parallel.data_parallel, "_sum_bucket", mean


def no_sum_over_replicas() -> tuple[Any, str, Callable[..., Any]]:
    return swinmoe.train.arm, "sync_expert_gradients", lambda *_: None


def clip_by_local_norm() -> tuple[Any, str, Callable[..., Any]]:
    """Swin-MoE's: each rank sees its own experts only."""

    def local(model: torch.nn.Module, limit: float, _: Any) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), limit)

    return swinmoe.train.arm, "clip_grad_norm", local


BREAKS = {
    "none": None,
    "wrong group": whole_world_in_backward,
    "wrong scale": mean_of_dense_gradients,
    "missing sum": no_sum_over_replicas,
    "local clipping": clip_by_local_norm,
}


@contextmanager
def broken(name: str) -> Iterator[None]:
    make = BREAKS[name]
    if make is None:
        yield
        return
    where, what, instead = make()
    right = getattr(where, what)
    setattr(where, what, instead)
    try:
        yield
    finally:
        setattr(where, what, right)


def prove_broken(name: str, cell: Cell, steps: int) -> ParallelProof:
    with broken(name):
        return verify_parallel(run_of(cell), steps=steps)


def test_unbroken_it_is_proven(pool4: Pool) -> None:
    assert pool4.run(prove_broken, "none", SQUARE, 1)[0].proven


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("wrong group", "the gradient of layers.0"),
        ("wrong scale", "the gradient of"),
        ("missing sum", "the gradient of layers.0.blocks.0.mlp.experts"),
        ("local clipping", "the gradients' norm"),
    ],
)
def test_a_break_is_noticed(pool4: Pool, name: str, seen: str) -> None:
    # One step, whose shares are equal: the forgetful exchange needs equal splits to pass unnoticed by gloo.
    proof = pool4.run(prove_broken, name, SQUARE, 1)[0]
    assert not proof.proven
    assert seen in " ".join(proof.failures)
    assert proof.bit_equal == (name in ("wrong group", "wrong scale")), proof.failures
