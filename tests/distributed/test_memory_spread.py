"""Moments dealt out (ZeRO) and dense parameters cut (FSDP2): one process's training, and a share of its bytes."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import spreads
import torch
from micro import MICRO
from pool import Pool
from spreads import CUT_AND_ZERO, CUT_REPLICAS, CUT_TWO, ONE, ZERO_FOUR, ZERO_REPLICAS, ZERO_TWO, Spread
from torch import nn

from swinmoe.comm.traffic import listen
from swinmoe.config import ParallelConfig, RunConfig
from swinmoe.config.io import build, merge
from swinmoe.data import build_data
from swinmoe.errors import BackendUnavailableError, ConfigError
from swinmoe.parallel import SplitOptimizer, holders_of, is_expert_parameter, local_part, make_mesh, shard_dense
from swinmoe.parallel.optimizer import make_adamw
from swinmoe.runtime import make_accelerator
from swinmoe.train.arm import Arm, make_arm
from swinmoe.train.evaluate import evaluate
from swinmoe.train.freeze import freeze
from swinmoe.train.schedule import Length
from swinmoe.verify import ParallelProof, verify_parallel

pytestmark = pytest.mark.distributed

PROVEN: dict[str, Any] = {
    "model": {**MICRO, "moe": {"num_experts": 4, "top_k": 2, "router": {"bias_update_rate": 0.01}}},
    "optim": {"layer_decay": 0.9},
    "train": {"accumulation": 2, "ema_decay": 0.9},
}


def prove(overrides: dict[str, Any], dtype: torch.dtype) -> ParallelProof:
    return verify_parallel(build(RunConfig, merge(PROVEN, overrides)), steps=4, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (2, {"parallel": {"zero": True}}),
        (2, {"parallel": {"shard_dense": True}, "model": {"grad_checkpointing": [1]}}),
        (2, {"parallel": {"shard_dense": True, "ep_size": 2}, "train": {"offload_activations": True}}),
        (4, {"parallel": {"zero": True, "ep_size": 2}, "model": {"attention_chunks": 2}}),
        (4, {"parallel": {"zero": True, "shard_dense": True, "ep_size": 2}, "model": {"grad_checkpointing": True}}),
        (2, {"parallel": {"shard_dense": True}, "model": {"moe": None}}),
    ],
    ids=["ZeRO", "FSDP2", "FSDP2 and experts", "ZeRO of replicas", "both", "dense"],
)
def test_training_is_that_of_one_process(
    pool2: Pool, pool4: Pool, processes: int, overrides: dict[str, Any], dtype: torch.dtype
) -> None:
    """Against the oracle: unequal shares and an idle rank, accumulation, clipping, rates by layer, an average."""
    proofs = {2: pool2, 4: pool4}[processes].run(prove, overrides, dtype)
    assert all(proof == proofs[0] for proof in proofs)
    assert proofs[0].proven, proofs[0].failures
    assert proofs[0].clip_factor < 1
    assert ("ZeRO" in proofs[0].spread) == ("zero" in overrides["parallel"])
    assert ("FSDP2" in proofs[0].spread) == ("shard_dense" in overrides["parallel"])


def bytes_held(spread: Spread) -> dict[str, int]:
    """Of this rank, after two steps, by what it is; of gradients, when the step gives them back."""
    arm, stream = spreads.start(spread, 4)
    gradients: dict[nn.Parameter, int] = {}
    give_back = arm.optimizer.zero_grad

    def count_and_give_back() -> None:
        gradients.update({p: local_part(p.grad).nbytes for p in arm.raw.parameters() if p.grad is not None})
        give_back()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arm.optimizer, "zero_grad", count_and_give_back)
        spreads.go_on(arm, stream, 2)
    held = dict.fromkeys(("dense", "dense gradients", "dense moments", "expert moments"), 0)
    for parameter in arm.raw.parameters():
        assert parameter.grad is None, "the step gives gradients back"
        kind = "expert" if is_expert_parameter(parameter) else "dense"
        state = arm.optimizer.state[parameter]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        held[f"{kind} moments"] += sum(local_part(state[k]).nbytes for k in state if not state[k].is_meta)
        if kind == "dense":
            held["dense"] += local_part(parameter).nbytes
            held["dense gradients"] += gradients[parameter]
    return held


@pytest.mark.parametrize(
    ("spread", "shares"),
    [
        (ZERO_TWO, {"dense": 1, "dense gradients": 1, "dense moments": 2}),
        (ZERO_FOUR, {"dense": 1, "dense gradients": 1, "dense moments": 4}),
        (ZERO_REPLICAS, {"dense": 1, "dense moments": 4, "expert moments": 4}),
        (CUT_TWO, {"dense": 2, "dense gradients": 2, "dense moments": 2}),
        (CUT_REPLICAS, {"dense": 4, "dense gradients": 4, "dense moments": 4, "expert moments": 2}),
        (CUT_AND_ZERO, {"dense": 4, "dense moments": 4, "expert moments": 4}),
    ],
    ids=lambda value: value.name if isinstance(value, Spread) else "",
)
def test_ranks_hold_a_share(pool2: Pool, pool4: Pool, spread: Spread, shares: dict[str, int]) -> None:
    """Together what one process or one replica holds, and none much more than its share."""
    experts = ("expert moments",) if spread.ep_size > 1 else ()
    whole = bytes_held(ONE)
    if experts:  # on one process they count as dense
        (replicas,) = {2: pool2, 4: pool4}[spread.processes].run(bytes_held, replace(spread, zero=False))[:1]
        whole["expert moments"] = 2 * replicas["expert moments"]
        whole["dense moments"] -= whole["expert moments"]
    ranks = {2: pool2, 4: pool4}[spread.processes].run(bytes_held, spread)
    for what, share in shares.items():
        if what in ("dense", "dense gradients") and experts:
            continue  # counted with their moments
        per_rank = [rank[what] for rank in ranks]
        # Tensors are not divided by ZeRO, rows not by FSDP2; a step count is a number of its own for every holder.
        assert max(per_rank) < 1.35 * whole[what] / share, (what, per_rank, whole[what])
        copies = spread.processes // share
        assert sum(per_rank) == pytest.approx(copies * whole[what], rel=0.02)


def frozen_losses(spread: Spread, policy: Any) -> tuple[list[float], int]:
    """Of an arm that trains some of its parameters, and how many parameters have moments here."""
    run = build(RunConfig, merge(spreads.RUN, {"model": {"moe": {"num_experts": 4}}}))
    config = ParallelConfig(ep_size=spread.ep_size, zero=spread.zero, shard_dense=spread.shard_dense)
    run = replace(run, parallel=config)
    mesh = make_mesh(config, 4)

    def prepare(model: Any) -> None:
        if policy == "all but experts":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(".experts." in name)
        else:
            freeze(model, policy)

    accelerator = make_accelerator("fp64", cpu=True)
    _, stream = spreads.start(spread, 4)
    arm = make_arm("model", run, mesh, accelerator, Length(steps=4), stream.steps_per_epoch, prepare)
    losses = spreads.go_on(arm, stream, 4)
    return losses, sum(not s["exp_avg"].is_meta for s in arm.optimizer.state.values())


@pytest.mark.parametrize("policy", ["experts", "backbone", "all but experts"])
@pytest.mark.parametrize("spread", [ZERO_REPLICAS, CUT_AND_ZERO], ids=lambda spread: spread.name)
def test_some_parameters_rest(pool4: Pool, spread: Spread, policy: str) -> None:
    expected, _ = frozen_losses(ONE, policy)
    for losses, _ in pool4.run(frozen_losses, spread, policy):
        assert losses == pytest.approx(expected, rel=1e-12)


def evaluated_between_steps(spread: Spread) -> tuple[list[float], list[float]]:
    """Losses of steps with an evaluation between them: a forward pass without a backward pass leaves nothing behind."""
    arm, stream = spreads.start(spread, 4)
    images = build_data(arm.run.data, seed=arm.run.seed).eval
    found = []
    for stop in (2, 4):
        losses = spreads.go_on(arm, stream, stop)
        arm.average = None  # the model itself is judged
        found.append(evaluate(arm, images, 33)["loss"])
        assert set(arm.optimizer.state) == set(arm.raw.parameters())
    return losses, found


@pytest.mark.parametrize("spread", [CUT_TWO, CUT_REPLICAS, ZERO_REPLICAS], ids=lambda spread: spread.name)
def test_evaluation_between_steps(pool2: Pool, pool4: Pool, spread: Spread) -> None:
    losses, found = evaluated_between_steps(ONE)
    for other_losses, other in {2: pool2, 4: pool4}[spread.processes].run(evaluated_between_steps, spread):
        assert other_losses == pytest.approx(losses, rel=1e-12)
        assert other == pytest.approx(found, rel=1e-12)


def who_steps() -> dict[str, Any]:
    """ZeRO over two replicas of two expert ranks: owners, and what this rank sends in a step."""
    arm, stream = spreads.start(ZERO_REPLICAS, 4)
    assert isinstance(arm.optimizer, SplitOptimizer)
    owners = {name: sorted(holders_of(arm.optimizer, p) or ()) for name, p in arm.raw.named_parameters()}
    mine = [p for p in arm.raw.parameters() if arm.mesh.rank in (holders_of(arm.optimizer, p) or ())]
    others = {True: 1, False: 3}  # ranks that a share is sent to: the other replica, or the rest of the world
    expected = sum(p.nbytes * others[is_expert_parameter(p)] for p in mine)
    with listen() as sent:
        spreads.go_on(arm, stream, 1)
    return {
        "owners": owners,
        "experts": [name for name, p in arm.raw.named_parameters() if is_expert_parameter(p)],
        "sent": sum(m.bytes for m in sent if m.operation == "broadcast"),
        "expected": expected,
    }


def test_who_steps_what(pool4: Pool) -> None:
    """A dense parameter has one owner in the world, an expert one replica; all ranks know that alike."""
    ranks = pool4.run(who_steps)
    for rank in ranks:
        assert rank["owners"] == ranks[0]["owners"]
        assert rank["sent"] == rank["expected"] > 0
        for name, owners in rank["owners"].items():
            assert owners in ([0, 1], [2, 3]) if name in rank["experts"] else len(owners) == 1
    assert {tuple(ranks[0]["owners"][name]) for name in ranks[0]["experts"]} == {(0, 1), (2, 3)}


def without_fairscale() -> str:
    mesh = make_mesh(ParallelConfig(zero=True))
    weight = nn.Parameter(torch.ones(2))
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "fairscale"}
    sys.modules["fairscale"] = None  # type: ignore[assignment]
    try:
        make_adamw([{"params": [weight]}], mesh, lr=0.1)
    except BackendUnavailableError as error:
        return str(error)
    finally:
        del sys.modules["fairscale"]
        sys.modules.update(hidden)
    return "no error"


def test_zero_needs_fairscale(pool2: Pool) -> None:
    for said in pool2.run(without_fairscale):
        assert "install swinmoe[fairscale], or set parallel.zero=false" in said


def a_scalar() -> str:
    module = nn.Linear(2, 2)
    module.gain = nn.Parameter(torch.ones(()))
    try:
        shard_dense(module, make_mesh(ParallelConfig(shard_dense=True)))
    except ConfigError as error:
        return str(error)
    return "no error"


def test_a_number_has_no_rows(pool2: Pool) -> None:
    for said in pool2.run(a_scalar):
        assert "'gain' has none; give it the shape (1,), or set parallel.shard_dense=false" in said


def test_on_one_process_there_is_nothing_to_share() -> None:
    arm: Arm = spreads.start(replace(ZERO_TWO, processes=1, shard_dense=True), 4)[0]
    assert type(arm.optimizer) is torch.optim.AdamW
    assert holders_of(arm.optimizer, next(arm.raw.parameters())) is None
