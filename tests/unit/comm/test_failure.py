"""A collective's failure is named; an error of one's own is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch

from swinmoe.comm import reduce
from swinmoe.comm.failure import naming
from swinmoe.errors import CollectiveError, ConfigError
from swinmoe.parallel import Mesh, clip_grad_norm, global_min, global_sum

CLOSED = (
    "[/src/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:37009. This is typically caused by a "
    "remote worker crashing. Check the logs."
)
IN_CALLBACK = f"Got the following error when running the callback: RuntimeError: {CLOSED}\n\nAt:\n  hook.py(12): then\n"


@pytest.mark.parametrize("words", [CLOSED, IN_CALLBACK])
@pytest.mark.parametrize("amid_other_work", [False, True])
def test_rank_operation_and_the_backends_reason_are_told(words: str, amid_other_work: bool) -> None:
    with pytest.raises(CollectiveError) as raised, naming("layer 3: sending", amid_other_work=amid_other_work):
        raise RuntimeError(words)
    assert str(raised.value) == (
        "rank 0: layer 3: sending did not finish (Connection closed by peer [127.0.0.1]:37009); another rank stopped, "
        "or takes another path through the model; look at that rank's message first"
    )


def test_errors_of_ones_own_pass() -> None:
    with pytest.raises(ConfigError), naming("anything"):
        raise ConfigError("wrong")
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2") as raised, naming("the forward", amid_other_work=True):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")
    assert type(raised.value) is RuntimeError


@pytest.mark.parametrize(
    "words",
    [
        "Invalid scalar type",
        "Split sizes doesn't match total dim 0 size",
        "ProcessGroupGloo::allgather: invalid tensor size at index 0 (expected (2), got (3))",
    ],
)
def test_what_this_rank_did_wrong_is_not_put_down_to_others(words: str) -> None:
    """Backends' own words for tensors that they do not take. A `CollectiveError` would not even be printed."""
    with pytest.raises(RuntimeError) as raised, naming("layer 3: sending"):
        raise RuntimeError(words)
    assert type(raised.value) is RuntimeError
    assert str(raised.value) == f"rank 0: layer 3: sending failed ({words})"


@pytest.mark.parametrize("words", ["Socket Timeout", "No route to host", "failed to recv, got 0 bytes", "Broken pipe"])
def test_a_transports_words_mean_another_rank(words: str) -> None:
    with pytest.raises(CollectiveError, match="did not finish"), naming("layer 3: sending"):
        raise RuntimeError(words)


def _clip(mesh: Mesh) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    clip_grad_norm([weight], 1.0, mesh)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda mesh: global_sum(torch.ones(1), mesh), "a sum over all ranks"),
        (lambda mesh: global_min(torch.ones(1), mesh, "the idle experts"), "the idle experts"),
        (_clip, "clipping"),
    ],
    ids=["sum", "minimum", "clipping"],
)
def test_reductions_say_what_they_were_for(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[Mesh], Any], what: str
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("Timed out waiting 600000ms for recv operation to complete")

    monkeypatch.setattr(Mesh, "world_group", "a group")
    monkeypatch.setattr(reduce, "note_all_reduce", lambda *_: None)
    monkeypatch.setattr(reduce, "gather_small", fail)
    with pytest.raises(CollectiveError, match=f"^rank 0: {what} did not finish .Timed out waiting 600000ms"):
        call(Mesh(world=2, ep_size=2))
