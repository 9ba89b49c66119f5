"""What a session says and records of the model that it trains."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from swinmoe.config import RunConfig
from swinmoe.config.io import build
from swinmoe.models import build_model
from swinmoe.models.compile import Compiled
from swinmoe.models.counts import count
from swinmoe.parallel import Mesh
from swinmoe.records import RunRecord, read_records
from swinmoe.train import Arm
from swinmoe.train.progress import Progress
from swinmoe.train.session import Session, memory_tactics


def described(
    tmp_path: Path,
    moe: dict[str, Any] | None,
    train: dict[str, Any] | None = None,
    compiled: Compiled | None = None,
) -> tuple[dict[str, Any], str]:
    """The `arm` record of a small model, and what was said to the person watching."""
    model = {"preset": "swin_moe_micro", "moe": moe} if moe else {"preset": "swin_micro"}
    run = build(RunConfig, {"model": model | {"in_chans": 1}, "train": train or {}})
    arm = SimpleNamespace(
        name="model",
        run=run,
        raw=build_model(run.model),
        counts=count(run.model),
        length=SimpleNamespace(steps=3),
        compiled=compiled,
        device=torch.device("cpu"),
    )
    screen = io.StringIO()
    path = tmp_path / "records.jsonl"
    session = Session(
        command="train",
        config=run,
        run=run,
        folder=tmp_path,
        resume="never",
        accelerator=None,
        mesh=Mesh(world=1, ep_size=1),
        records=RunRecord(path),
        progress=Progress(console=Console(file=screen, width=300)),
    )
    session.describe(cast(Arm, arm))
    return read_records(path)[-1], screen.getvalue()


def test_what_auto_takes_is_said_and_kept(tmp_path: Path) -> None:
    record, said = described(tmp_path, {"num_experts": 4, "dispatcher": "auto"})
    assert record["dispatcher"] == "ragged" and record["dispatcher_reason"].startswith("on a CPU")
    assert said.count("moe.dispatcher=auto takes ragged: on a CPU sizes are known") == 1


@pytest.mark.parametrize(
    ("moe", "taken"), [({"num_experts": 4, "dispatcher": "padded"}, "padded"), (None, None)], ids=["padded", "dense"]
)
def test_where_the_config_names_it_nothing_is_said(
    tmp_path: Path, moe: dict[str, Any] | None, taken: str | None
) -> None:
    record, said = described(tmp_path, moe)
    assert (record["dispatcher"], record["dispatcher_reason"]) == (taken, None)
    assert "dispatcher" not in said


@pytest.mark.usefixtures("expert_kernel")
def test_experts_that_take_the_kernel_are_said_and_kept(tmp_path: Path) -> None:
    record, said = described(tmp_path, {"num_experts": 4})
    assert (record["experts_in_kernel"], record["experts_in_kernel_reason"]) == (True, None)
    assert said.count("takes our kernel in C++ for experts") == 1


@pytest.mark.parametrize(
    ("train", "moe", "reason"),
    [
        ({"native_kernels": "none"}, {}, "train.native_kernels=none"),
        ({"precision": "bf16"}, {}, "it takes float32 alone, and train.precision=bf16"),
        ({}, {"experts": {"type": "swiglu"}}, "it has gelu and relu between the layers, and they SwiGlu"),
    ],
)
def test_so_is_why_they_do_not(tmp_path: Path, train: dict[str, Any], moe: dict[str, Any], reason: str) -> None:
    record, said = described(tmp_path, {"num_experts": 4} | moe, train)
    assert (record["experts_in_kernel"], record["experts_in_kernel_reason"]) == (False, reason)
    assert f"computes experts with torch's operators, not our kernel: {reason}" in said


def test_experts_in_a_compiled_graph_do_not_take_it(tmp_path: Path) -> None:
    """Nor is it said of layers of which some are, and others not."""
    layers = list(
        build_model(build(RunConfig, {"model": {"preset": "swin_moe_micro", "in_chans": 1}}).model).moe_layers()
    )
    first = layers[0].removesuffix(".mlp")
    record, said = described(tmp_path, {"num_experts": 4}, compiled=Compiled((first, "another"), {}))
    reason = f"in 1 of {len(layers)} layers they are part of a compiled graph"
    assert (record["experts_in_kernel"], record["experts_in_kernel_reason"]) == (False, reason)
    assert reason in said


def test_of_experts_that_are_not_there_nothing_is_said(tmp_path: Path) -> None:
    record, said = described(tmp_path, None)
    assert (record["experts_in_kernel"], record["experts_in_kernel_reason"], said) == (None, None, "")


@pytest.mark.parametrize(
    ("model", "train", "parallel", "said"),
    [
        ({}, {}, {}, []),
        ({"grad_checkpointing": True}, {}, {}, ["recomputing blocks"]),
        ({"grad_checkpointing": [1]}, {}, {}, ["recomputing blocks of stages [1]"]),
        ({"attention_chunks": 4}, {}, {}, ["attention in chunks (4)"]),
        ({}, {"offload_activations": True}, {}, ["keeping activations on the host, where they are anyway"]),
        (
            {},
            {},
            {"zero": True, "shard_dense": True},
            [
                "dealing out the optimiser's moments (ZeRO), of no use on one process",
                "cutting dense parameters over ranks (FSDP2), of no use on one process",
            ],
        ),
    ],
    ids=str,
)
def test_how_memory_is_saved_is_said(model: Any, train: Any, parallel: Any, said: list[str]) -> None:
    run = build(RunConfig, {"model": {"preset": "swin_moe_micro", **model}, "train": train, "parallel": parallel})
    arm = cast(Arm, SimpleNamespace(run=run, device=torch.device("cpu")))
    assert memory_tactics(arm, 1) == said
