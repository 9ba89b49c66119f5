"""Ranks that disagree are named; a rank that stays away is reported by those who wait for it."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from pool import Pool

from swinmoe.comm import all_to_all_rows
from swinmoe.config import ParallelConfig
from swinmoe.errors import DistributedError
from swinmoe.parallel import make_mesh
from swinmoe.runtime import agree, describe_environment

pytestmark = pytest.mark.distributed


def disagreement(values: list[str]) -> str:
    try:
        agree(values[dist.get_rank()], "config")
    except DistributedError as error:
        return str(error)
    return "agreed"


def test_a_rank_with_another_config_is_named_on_all_ranks(pool4: Pool) -> None:
    assert pool4.run(disagreement, ["a", "a", "a", "a"]) == ["agreed"] * 4
    messages = pool4.run(disagreement, ["a", "a", "b", "a"])
    assert len(set(messages)) == 1
    assert "ranks disagree on the config: most have 'a', but rank 2 has 'b'; start all processes" in messages[0]


def absent_partner() -> str:
    """Rank 1 never enters the exchange that rank 0 waits for."""
    impatient = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    message = ""
    if dist.get_rank() == 0:
        try:
            all_to_all_rows(torch.zeros(2, 3), [1, 1], [1, 1], impatient, "layers.1.blocks.1.mlp: sending tokens")
        except DistributedError as error:
            message = str(error)
    dist.barrier()
    return message


def test_an_exchange_that_does_not_finish_names_rank_layer_and_operation(pool2: Pool) -> None:
    message, silence = pool2.run(absent_partner)
    assert message.startswith("rank 0: layers.1.blocks.1.mlp: sending tokens did not finish")
    assert silence == ""


def roles() -> tuple[bool, int]:
    return make_mesh(ParallelConfig(), None).is_main, describe_environment()["world_size"]


def test_the_first_rank_is_the_main_process(pool2: Pool) -> None:
    assert pool2.run(roles) == [(True, 2), (False, 2)]
