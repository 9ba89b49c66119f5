"""Ranks that disagree are named; a rank that stays away is reported by those who wait for it."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from pool import Pool

from swinmoe.comm import all_to_all_rows
from swinmoe.config import ParallelConfig
from swinmoe.errors import CollectiveError, DistributedError
from swinmoe.parallel import make_mesh
from swinmoe.runtime import UNKNOWN, agree, describe_environment

pytestmark = pytest.mark.distributed


def disagreement(facts: list[dict[str, object]]) -> str:
    try:
        agree(facts[dist.get_rank()])
    except DistributedError as error:
        return str(error)
    return "agreed"


def unsure_disagreement(facts: list[dict[str, object]]) -> str:
    """`UNKNOWN` is one object in each process: on the way it is a word."""
    return disagreement([{k: UNKNOWN if v == "unknown" else v for k, v in f.items()} for f in facts])


def test_a_rank_with_another_config_is_named_on_all_ranks(pool4: Pool) -> None:
    usual = {"the config's seed": 1, "the length of the data": 9}
    assert pool4.run(disagreement, [usual] * 4) == ["agreed"] * 4
    messages = pool4.run(disagreement, [usual, usual, usual | {"the config's seed": 2}, usual])
    assert len(set(messages)) == 1
    assert messages[0].startswith(
        "ranks disagree on the config's seed: ranks 0, 1, 3 have '1', but rank 2 has '2'; start all processes"
    )


def test_every_difference_is_listed_and_a_missing_fact_is_one(pool2: Pool) -> None:
    (message, _) = pool2.run(disagreement, [{"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5}])
    assert "disagree on b: rank 0 has '2', but rank 1 has '5'; on c: rank 0 has '3', but rank 1 has none;" in message


def test_what_a_rank_could_not_find_out_differs_from_nothing(pool4: Pool) -> None:
    """Git on a slow file system, for one."""
    here: dict[str, object] = {"the commit": "f00", "the data": 9}
    unsure = here | {"the commit": "unknown"}
    assert pool4.run(unsure_disagreement, [here, unsure, here, here]) == ["agreed"] * 4
    assert pool4.run(unsure_disagreement, [unsure] * 4) == ["agreed"] * 4
    other = here | {"the commit": "bad"}
    (message, *_) = pool4.run(unsure_disagreement, [here, unsure, here, other])
    assert "disagree on the commit: ranks 0, 2 have 'f00', but rank 3 has 'bad';" in message
    # None is a value like others: a config may have it on one rank and not on the next.
    (message, *_) = pool4.run(disagreement, [here, here | {"the data": None}, here, here])
    assert "disagree on the data: ranks 0, 2, 3 have '9', but rank 1 has 'None';" in message


def absent_partner() -> str:
    """Rank 1 never enters the exchange that rank 0 waits for."""
    impatient = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    message = ""
    if dist.get_rank() == 0:
        try:
            all_to_all_rows(torch.zeros(2, 3), [1, 1], [1, 1], impatient, "layers.1.blocks.1.mlp: sending tokens")
        except CollectiveError as error:
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
