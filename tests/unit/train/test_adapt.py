"""The factor that follows the load: its rule, its exactness in slots, and its state."""

from __future__ import annotations

import json
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swinmoe.config import AdaptConfig, ModelConfig
from swinmoe.config.io import build
from swinmoe.models import SwinTransformer, build_model
from swinmoe.moe import MoEMlp, RoutingStats, allowed_drops, capacity
from swinmoe.train.adapt import CapacityFollower, needed_factor, next_factor

LAYER = "layers.1.blocks.1.mlp"
factors = st.floats(0.01, 20)
rules = st.builds(
    lambda floor, room, margin, hysteresis: AdaptConfig(
        floor=floor, ceiling=None if room is None else floor + room, margin=margin, hysteresis=hysteresis
    ),
    st.floats(0, 3),
    st.one_of(st.none(), st.floats(0.01, 3)),
    st.floats(0, 1),
    st.floats(0, 1),
)


@settings(deadline=None)
@given(factors, factors, rules)
def test_it_stays_between_floor_and_ceiling_and_covers_the_need(factor, need, rule):
    after = next_factor(rule.clamp(factor), need, rule)
    assert rule.floor <= after <= (rule.ceiling or 1e9)
    assert after >= min(need, rule.ceiling or need)


@settings(deadline=None)
@given(factors, factors, rules)
def test_it_rests_once_it_has_followed(factor, need, rule):
    """No swinging: the same need again changes nothing, nor does any that is smaller by less than the hysteresis."""
    after = next_factor(factor, need, rule)
    assert next_factor(after, need, rule) == after
    if after == rule.clamp((1 + rule.margin) * need):
        assert next_factor(after, need / (1 + 0.99 * rule.hysteresis), rule) == after


@settings(deadline=None)
@given(factors, factors, factors, rules)
def test_more_need_never_means_fewer_slots(factor, one, other, rule):
    low, high = sorted((one, other))
    factor = rule.clamp(factor)
    # Down to its target or not at all: within the band the factor may stay above a target it would go up to.
    assert next_factor(factor, high, rule) >= min(next_factor(factor, low, rule), rule.clamp((1 + rule.margin) * high))


def test_the_rule_by_hand():
    rule = AdaptConfig(floor=0.5, ceiling=2.0, margin=0.1, hysteresis=0.2)
    assert next_factor(1.0, 1.5, rule) == 1.1 * 1.5  # up at once
    assert next_factor(1.65, 1.3, rule) == 1.65  # 1.65 <= 1.2 * 1.43
    assert next_factor(1.65, 1.2, rule) == 1.1 * 1.2  # 1.65 > 1.2 * 1.32
    assert next_factor(1.65, 9.0, rule) == 2.0
    assert next_factor(1.65, 0.1, rule) == 0.5


def model(capacity_config: dict[str, Any] | None = None, top_k: int = 1) -> SwinTransformer:
    adaptive = {"train": {"kind": "adaptive", "factor": 1.0, "adapt": {"floor": 0.1, "every": 2}}}
    moe = {"num_experts": 4, "top_k": top_k, "capacity": capacity_config or adaptive}
    return build_model(build(ModelConfig, {"preset": "swin_moe_micro", "moe": moe}))


def layer_of(swin: SwinTransformer) -> MoEMlp:
    (layer,) = swin.moe_layers().values()
    return layer


def stats_of(routed: list[int], layer: MoEMlp) -> RoutingStats:
    tokens, counts = sum(routed) // layer.top_k, torch.tensor(routed)
    zero = torch.zeros(())
    return RoutingStats(counts, counts, torch.tensor(tokens), zero, {}, zero, counts[:0])


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=4, max_size=4), st.integers(1, 3), st.sampled_from([0.0, 0.01, 0.2]))
def test_the_need_is_the_least_factor_that_keeps_the_promise(loads, top_k, max_drop):
    swin = model({"train": {"kind": "adaptive", "adapt": {"max_drop": max_drop}, "min_slots": 0}}, top_k)
    layer, routed = layer_of(swin), [top_k * load for load in loads]
    tokens = sum(loads)
    need = float(needed_factor(stats_of(routed, layer), layer))
    policy = layer.cfg.capacity.train
    allowed = allowed_drops(policy, tokens, top_k)

    def dropped(factor: float) -> int:
        slots = top_k * int(factor * -(-tokens // 4))
        return sum(max(0, n - slots) for n in routed)

    assert dropped(need + 1e-9) <= allowed
    share = -(-tokens // 4)
    if need > 0:
        assert dropped(need - 0.5 / share) > allowed


def test_decisions_come_when_due_and_from_the_largest_need():
    swin = model()
    layer, follower = layer_of(swin), CapacityFollower(swin)
    (name,) = swin.moe_layers()
    assert follower.factors == {name: 1.0}
    follower.note({name: stats_of([40, 0, 0, 0], layer)})
    follower.note({name: stats_of([10, 10, 10, 10], layer)})
    assert follower.decide(1, lambda v: v) == {} and follower.factors == {name: 1.0}
    asked = []

    def over_ranks(vector: torch.Tensor) -> torch.Tensor:
        asked.append(vector.tolist())
        return vector

    changes = follower.decide(2, over_ranks)
    assert asked == [[4.0]] and changes == {name: {"need": 4.0, "before": 1.0, "after": 1.05 * 4.0}}
    assert layer.cfg.capacity.train.factor == 1.05 * 4.0
    assert capacity(layer.cfg.capacity.train, 40, 4, 1) == 42
    assert follower.decide(4, over_ranks) == {} and len(asked) == 1  # nothing seen since


def test_the_log_counts_passes_that_needed_more():
    swin = model()
    layer, follower = layer_of(swin), CapacityFollower(swin)
    (name,) = swin.moe_layers()
    for loads in ([40, 0, 0, 0], [10, 10, 10, 10], [11, 10, 10, 9]):
        follower.note({name: stats_of(loads, layer)})
    assert follower.take_log(lambda v: v, lambda v: 2 * v)[name] == {
        "capacity_factor": 1.0,
        "capacity_need": 4.0,
        "capacity_beyond": 4,
    }
    assert follower.take_log(lambda v: v, lambda v: v) == {}


def test_state_survives_json_and_decides_alike():
    one, other = model(), model()
    (name,) = one.moe_layers()
    first, second = CapacityFollower(one), CapacityFollower(other)
    first.note({name: stats_of([13, 9, 9, 9], layer_of(one))})
    first.decide(2, lambda v: v)
    first.note({name: stats_of([29, 3, 4, 4], layer_of(one))})
    second.load(json.loads(json.dumps(first.state(lambda v: v))))
    assert second.factors == first.factors
    for follower in (first, second):
        follower.note({name: stats_of([12, 10, 9, 9], layer_of(one))})
    assert first.decide(4, lambda v: v) == second.decide(4, lambda v: v) != {}


def test_without_adaptive_layers_nothing_is_asked_of_other_ranks():
    follower = CapacityFollower(model({"train": {"kind": "fixed"}}))

    def never(vector: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    assert follower.decide(10, never) == follower.take_log(never, never) == {}
    assert follower.state(never) == {"factors": {}, "needs": {}}
