"""Verdicts, what a run is proven on, and what the command says of it."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from swinmoe.commands import verify as command
from swinmoe.config import ParallelConfig, RunConfig
from swinmoe.config.io import build
from swinmoe.errors import ConfigError
from swinmoe.verify import ParallelProof, launch, verify_parallel
from swinmoe.verify.parallel import describe
from swinmoe.verify.setting import CLIP, batches_of, part_of, provable, shares_of

GOOD = ParallelProof(
    processes=2,
    spread="2 processes",
    dtype="float64",
    steps=3,
    tolerance=1e-9,
    loss=1.0,
    loss_difference=1e-15,
    norm_difference=1e-15,
    gradients={"a": 1e-15, "b": 1e-14},
    parameters={"a": 1e-13, "b": 0.0},
    clip_factor=0.5,
    largest_clip_factor=0.75,
    routed=100,
    dropped=0,
    same_counts=True,
    bit_equal=True,
    set_aside=(),
)


def tiny(**changes: object) -> RunConfig:
    tree = {
        "model": {"preset": "swin_moe_micro", "in_chans": 1, "drop_path_rate": 0.1},
        "train": {"accumulation": 2, "batch_size": 4},
    }
    return build(RunConfig, {**tree, **changes})


def test_a_proof_needs_everything() -> None:
    assert GOOD.proven and GOOD.worst_gradient == ("b", 1e-14) and GOOD.worst_parameter == ("a", 1e-13)
    for change, said in (
        ({"loss_difference": 1e-8}, "the loss is off by 1.0e-08"),
        ({"norm_difference": math.nan}, "the gradients' norm is off by nan"),
        ({"gradients": {"a": 0.0, "b": math.nan, "c": 1.0}}, "the gradient of b is off by nan"),
        ({"parameters": {"a": 2e-9}}, "after 3 steps a is off by 2.0e-09"),
        ({"same_counts": False}, "other numbers of tokens"),
        ({"bit_equal": False}, "hold different ones"),
    ):
        bad = replace(GOOD, **change)  # type: ignore[arg-type]
        assert not bad.proven and len(bad.failures) == 1 and said in bad.failures[0]
    assert GOOD.as_json()["proven"] is True and json.loads(json.dumps(GOOD.as_json()))["gradients"] == GOOD.gradients


def test_what_cannot_be_shared_is_set_aside_and_said() -> None:
    run, notes = provable(tiny(), world=4, steps=7, precision="fp64")
    assert notes == (
        f"train.batch_size={tiny().train.batch_size} -> 24",
        "train.precision=fp32 -> fp64",
        "model.drop_path_rate=0.1 -> 0.0",
        f"optim.clip_grad_norm=5.0 -> {CLIP}",
    )
    assert run.model.drop_path_rate == 0 and run.train.precision == "fp64" and run.train.steps == 7
    assert run.train.batch_size == 2 * 12 and run.model.moe == tiny().model.moe
    assert provable(tiny(optim={"clip_grad_norm": None}), world=1, steps=1, precision="fp64")[0].optim == replace(
        tiny().optim, clip_grad_norm=None
    )


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_shares_are_equal_then_anything(world: int) -> None:
    images = 3 * world
    seen = []
    for step in range(12):
        for micro in range(2):
            shares = shares_of(step, micro, images, world)
            assert len(shares) == world and sum(shares) == images and min(shares) >= 0
            if step % 2 == 0:
                assert shares == [3] * world
            seen.append(tuple(shares))
    if world > 1:
        assert sum(0 in shares for shares in seen) >= 6 and len(set(seen)) > 4
        idle = {shares.index(0) for shares in seen if 0 in shares}
        assert len(idle) > 1, "always the same rank has nothing"


def test_ranks_parts_are_the_batch() -> None:
    run, _ = provable(tiny(), world=2, steps=1, precision="fp32")
    first, second = batches_of(run, 0, torch.device("cpu"))
    assert not torch.equal(first.images, second.images) and first.images.dtype == torch.float32
    shares = [2, 4]
    parts = [part_of(first, shares, rank) for rank in range(2)]
    assert torch.equal(torch.cat([part.images for part in parts]), first.images)
    assert torch.equal(torch.cat([part.targets for part in parts]), first.targets)


@pytest.mark.parametrize(
    ("parallel", "experts", "world", "words"),
    [
        ({}, 8, 1, "1 process: 1 x 1 (data x expert parallel)"),
        ({"ep_size": 2}, None, 4, "4 processes: 2 x 2 (data x expert parallel), tokens travel, flat"),
        ({"ep_size": 4, "weight_group": 4}, 2, 4, "each of 2 experts in 2 slices, weights travel"),
        ({"ep_size": 4, "weight_group": 2, "chunks": 3}, 4, 4, "tokens and weights travel, flat in 3 chunks"),
        ({"ep_size": 4, "exchange": "2dh", "local_size": 2}, 4, 4, "tokens travel, 2dh"),
    ],
)
def test_meshes_in_words(parallel: dict[str, object], experts: int | None, world: int, words: str) -> None:
    assert words in describe(build(ParallelConfig, parallel), experts, world)


def test_one_process_is_a_mesh_too() -> None:
    seen: list[int] = []
    proof = verify_parallel(tiny(), steps=2, on_step=seen.append)
    assert proof.proven and proof.processes == 1 and seen == [1, 2]
    with pytest.raises(ConfigError, match=r"cannot verify in torch\.bfloat16; use torch\.float64"):
        verify_parallel(tiny(), dtype=torch.bfloat16)


def test_what_is_shown() -> None:
    out = io.StringIO()
    bad = replace(GOOD, bit_equal=False, set_aside=("a=1 -> 0",), clip_factor=1.0, largest_clip_factor=1.0)
    command.show(bad, replace(GOOD, dtype="float32"), Console(file=out, width=120))
    text = out.getvalue()
    for said in (
        "bit-equal: NO",
        "set aside for the proof: a=1 -> 0",
        "NOT proven: ranks",
        "(never active)",
        "0 of 100",
    ):
        assert said in text, text


@pytest.mark.parametrize(
    ("largest", "said"),
    [
        (0.75, "clip factors: 0.5 to 0.75 (active at every step)"),
        (1.0, "clip factors: 0.5 to 1 (not active at every step)"),
    ],
)
def test_whether_every_step_was_clipped_is_shown(largest: float, said: str) -> None:
    out = io.StringIO()
    command.show(replace(GOOD, largest_clip_factor=largest), GOOD, Console(file=out, width=120))
    assert said in out.getvalue()


def test_the_largest_clip_factor_is_remembered() -> None:
    """The smallest alone says that some step was clipped, not that every one was."""
    loose = verify_parallel(tiny(optim={"clip_grad_norm": None}), steps=2)
    assert (loose.clip_factor, loose.largest_clip_factor) == (1.0, 1.0)
    tight = verify_parallel(tiny(optim={"clip_grad_norm": 0.01}), steps=3)
    assert 0 < tight.clip_factor < tight.largest_clip_factor < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "--steps 0 and --processes None must be at least 1"),
        ({"processes": 0}, "--processes 0 must be at least 1"),
        ({"processes": 3}, "--processes 3 under a launcher that started 2"),
    ],
)
def test_impossible_numbers_are_refused(
    arguments: dict[str, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = tmp_path / "c.yaml"
    config.write_text("model: {preset: swin_moe_micro}\n")
    usual = {"steps": 1, "processes": None, "json_path": None, "full_size": False}
    with pytest.raises(ConfigError, match=message):
        command.run(config, [], **{**usual, **arguments})  # type: ignore[arg-type]


def test_the_first_to_fail_ends_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An interpreter that fails in rank 1 and otherwise sleeps."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\n[ "$RANK" = 1 ] && exit 3\n[ "$1" = -m ] && exec sleep 60\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.2)
    assert launch.run_on(3, []) == 3
    fake.write_text("#!/bin/sh\nkill -9 $$\n")
    assert launch.run_on(2, []) == 137
    fake.write_text("#!/bin/sh\nexit 0\n")
    assert launch.run_on(2, []) == 0
