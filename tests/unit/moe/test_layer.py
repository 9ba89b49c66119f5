"""What a user of the layer counts on: seeds, precision, copies, errors, plug-ins, statistics."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from swinmoe.config import CapacityConfig, CapacityPolicy, ExpertConfig, MoEConfig, RouterConfig
from swinmoe.errors import ConfigError, RoutingError
from swinmoe.moe import (
    Dispatcher,
    Experts,
    MoEMlp,
    Router,
    merge,
    register_dispatcher,
    register_expert,
    register_router,
    summarise,
)
from swinmoe.moe.activations import Activation
from swinmoe.moe.registry import DISPATCHERS, EXPERTS, ROUTERS
from swinmoe.moe.types import ExpertRows


def make(dim=4, hidden=6, name="moe", seed=0, init_std=0.02, dtype=None, **kw) -> MoEMlp:
    return MoEMlp(MoEConfig(**kw), dim=dim, hidden_dim=hidden, name=name, seed=seed, init_std=init_std, dtype=dtype)


# -------------------------------------------------------------------------------------------------- shapes and weights


def test_shapes_and_names():
    layer = make(num_experts=5, top_k=2, experts=ExpertConfig(type="swiglu", hidden_ratio=0.5), shared_expert_ratio=1.0)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "router.weight": (5, 4),
        "experts.fc1_weight": (5, 6, 4),
        "experts.fc1_bias": (5, 6),
        "experts.fc2_weight": (5, 4, 3),
        "experts.fc2_bias": (5, 4),
        "shared.fc1_weight": (1, 12, 4),
        "shared.fc1_bias": (1, 12),
        "shared.fc2_weight": (1, 4, 6),
        "shared.fc2_bias": (1, 4),
    }
    y, stats = layer(torch.randn(2, 3, 4, 4))
    assert y.shape == (2, 3, 4, 4)
    assert stats.expert_ids.shape == (24, 2)


def test_cosine_router_parameters_are_tutels():
    layer = make(num_experts=5, router=RouterConfig(type="cosine", proj_dim=3))
    shapes = {name: tuple(p.shape) for name, p in layer.router.named_parameters()}
    assert shapes == {"projector.weight": (3, 4), "projector.bias": (3,), "sim_matrix": (3, 5), "temperature": (1,)}
    assert math.isclose(layer.router.temperature.item(), math.log(2), rel_tol=1e-6)
    x = torch.randn(6, 4)
    directions = F.normalize(layer.router.sim_matrix, dim=0)
    want = F.normalize(layer.router.projector(x), dim=1) @ directions * 2
    torch.testing.assert_close(layer.router(x).logits, want)
    with torch.no_grad():
        layer.router.temperature.fill_(100.0)
    torch.testing.assert_close(layer.router(x).logits, want * 50, rtol=1e-4, atol=1e-4)  # the scale ends at 100


def test_initial_weights_depend_on_seed_layer_and_expert_alone():
    few, many = make(num_experts=2), make(num_experts=6, top_k=3, dispatcher="padded")
    assert torch.equal(few.experts.fc1_weight, many.experts.fc1_weight[:2])
    assert torch.equal(few.experts.fc2_weight, many.experts.fc2_weight[:2])
    torch.manual_seed(99)
    again = make(num_experts=2)
    assert all(torch.equal(a, b) for a, b in zip(few.parameters(), again.parameters(), strict=True))
    assert not torch.equal(few.experts.fc1_weight, make(num_experts=2, seed=1).experts.fc1_weight)
    assert not torch.equal(few.experts.fc1_weight, make(num_experts=2, name="other").experts.fc1_weight)
    assert not torch.equal(few.experts.fc1_weight[0], few.experts.fc1_weight[1])
    wide = make(num_experts=2, dtype=torch.float64)
    assert torch.equal(wide.experts.fc1_weight.float(), few.experts.fc1_weight)


def test_making_a_layer_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    make(router=RouterConfig(type="cosine", noise=1.0))
    assert torch.equal(torch.rand(1), want)


def test_initial_distribution_is_the_dense_mlps():
    layer = make(dim=64, hidden=256, num_experts=4, init_std=0.02)
    for weight in (layer.experts.fc1_weight.detach(), layer.experts.fc2_weight.detach()):
        assert abs(float(weight.std()) / 0.02 - 1) < 0.02
        assert abs(float(weight.mean())) < 1e-3
    assert not layer.experts.fc1_bias.any()
    assert not layer.experts.fc2_bias.any()
    wild = make(dim=64, hidden=64, num_experts=2, init_std=3.0)
    assert wild.experts.fc1_weight.abs().max() <= 2  # clipped at an absolute value, as timm and torch do


def test_meta_device_costs_nothing():
    layer = MoEMlp(
        MoEConfig(num_experts=128, router=RouterConfig(type="cosine")), dim=1024, hidden_dim=4096, device="meta"
    )
    assert sum(p.numel() for p in layer.experts.parameters()) == 128 * (2 * 1024 * 4096 + 1024 + 4096)
    assert all(p.is_meta for p in layer.parameters())


def test_second_bias_frozen_or_absent():
    frozen = make(experts=ExpertConfig(fc2_bias="frozen-zero"))
    assert not frozen.experts.fc2_bias.requires_grad
    assert "experts.fc2_bias" in frozen.state_dict()
    frozen(torch.randn(5, 4))[0].sum().backward()
    assert make(experts=ExpertConfig(fc2_bias="none", fc1_bias=False)).experts.fc2_bias is None


def test_forward_flops_are_those_of_the_active_experts_and_the_gate():
    layer = make(dim=8, hidden=16, num_experts=4, top_k=2, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(10, 8))
    assert counter.get_total_flops() == 2 * 10 * 2 * (2 * 8 * 16) + 2 * 10 * 8 * 4


# ---------------------------------------------------------------------------------------------- noise, bias, precision


def test_noise_has_its_own_generator():
    layer = make(num_experts=4, router=RouterConfig(noise=2.0))
    layer.seed_noise(7)
    torch.manual_seed(0)
    first = layer.draw_noise(1000, "cpu")
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))
    assert first.shape == (1000, 4)
    assert abs(float(first.std()) / (2.0 / 4) - 1) < 0.05
    second = layer.draw_noise(1000, "cpu")
    assert not torch.equal(first, second)
    layer.seed_noise(7)
    assert torch.equal(layer.draw_noise(1000, "cpu"), first)
    assert layer.eval().draw_noise(5, "cpu") is None
    assert make(num_experts=4).draw_noise(5, "cpu") is None


def test_forward_draws_noise_itself_in_training():
    layer = make(num_experts=4, router=RouterConfig(noise=4.0), init_std=1.0)
    x = torch.randn(30, 4)
    layer.seed_noise(1)
    noise = layer.draw_noise(30, x.device)
    layer.seed_noise(1)
    assert torch.equal(layer(x)[0], layer(x, noise)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_bias_moves_against_the_load_and_never_enters_the_gate():
    layer = make(num_experts=3, router=RouterConfig(bias_update_rate=0.1), init_std=1.0)
    layer.update_bias(torch.tensor([9, 3, 0]))  # mean 4
    torch.testing.assert_close(layer.router.expert_bias, torch.tensor([-0.1, 0.1, 0.1]))
    assert "router.expert_bias" in layer.state_dict()
    x = torch.randn(6, 4)
    with torch.no_grad():
        layer.router.expert_bias.copy_(torch.tensor([0.0, 0.0, 5.0]))
    routing = layer.router(x)
    assert (routing.expert_ids == 2).all()
    torch.testing.assert_close(routing.gates[:, 0], (x @ layer.router.weight.t()).softmax(-1)[:, 2])
    plain = make(num_experts=3)
    plain.update_bias(torch.tensor([9, 3, 0]))
    assert plain.router.expert_bias is None


def test_gates_are_normalised_only_among_several():
    x = torch.randn(6, 4)
    two = make(num_experts=4, top_k=2, router=RouterConfig(normalize_gates=True)).router(x)
    torch.testing.assert_close(two.gates.sum(-1), torch.ones(6))
    one = make(num_experts=4, top_k=1, router=RouterConfig(normalize_gates=True)).router(x)
    assert (one.gates < 1).all()


@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_gate_stays_wide_under_autocast(router):
    layer = make(dim=8, num_experts=4, top_k=2, router=RouterConfig(type=router, proj_dim=4), init_std=1.0)
    x = torch.randn(9, 8)
    want = layer.router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = layer.router(x)
        y, stats = layer(x)
    assert routing.logits.dtype == routing.gates.dtype == torch.float32
    torch.testing.assert_close(routing.logits, want.logits, atol=0, rtol=0)
    assert y.dtype == torch.bfloat16  # as a dense MLP under autocast
    assert stats.loss.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x)[0], atol=0.2, rtol=0.05)
    wide = make(dim=8, num_experts=4, dtype=torch.float64)
    assert wide.router(x.double()).logits.dtype == torch.float64


def test_autocast_leaves_double_precision_alone():
    layer = make(num_experts=4, dtype=torch.float64)
    x = torch.randn(9, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = layer(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, layer(x)[0], atol=0, rtol=0)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("dispatcher", ["ragged", "padded"])
def test_autocast_gives_float32_gradients_near_the_exact_ones(dispatcher, persistent):
    layer = make(dim=8, num_experts=3, top_k=2, dispatcher=dispatcher, init_std=0.5)
    x = torch.randn(40, 8)
    layer(x)[0].square().sum().backward()
    want = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad(set_to_none=not persistent)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = layer(x)
    y.float().square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad.dtype == torch.float32
        error = (p.grad - want[name]).norm() / want[name].norm()
        assert 0 < float(error) < 0.03, name


def test_dropout_acts_in_training_inside_the_experts():
    layer = make(dim=8, hidden=512, num_experts=2, experts=ExpertConfig(dropout=0.25), init_std=0.5)
    x = torch.randn(5, 8)
    assert torch.equal(layer.eval()(x)[0], layer(x)[0])
    exact = layer(x)[0]
    layer.train()
    draws = torch.stack([layer(x)[0].detach() for _ in range(200)])
    assert draws.std(0).min() > 0
    torch.testing.assert_close(draws.mean(0), exact, atol=float(5 * draws.std(0).max() / 200**0.5), rtol=0)


# ------------------------------------------------------------------------------------------------------ nothing sticks


def test_forward_leaves_nothing_behind():
    layer = make(num_experts=4, top_k=2, router=RouterConfig(noise=1.0))
    before = {k: v for k, v in vars(layer).items() if k != "_generator"}
    y, stats = layer(torch.randn(9, 4))
    assert {k: v for k, v in vars(layer).items() if k != "_generator"} == before
    assert not vars(y)
    twin = copy.deepcopy(layer)  # with a graph hanging on it this would fail
    (y.sum() + stats.loss).backward()
    assert all(p.grad is None for p in twin.parameters())
    twin.seed_noise(3)
    layer.seed_noise(3)
    x = torch.randn(9, 4)
    assert torch.equal(twin(x)[0], layer(x)[0])


def test_every_parameter_gets_a_gradient_even_without_tokens_of_its_own():
    for dispatcher in ("ragged", "padded"):
        layer = make(num_experts=6, dispatcher=dispatcher, shared_expert_ratio=0.5, router=RouterConfig(type="cosine"))
        for tokens in (1, 0):
            layer.zero_grad(set_to_none=True)
            y, stats = layer(torch.randn(tokens, 4))
            (y.sum() + stats.loss).backward()
            assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())


def test_evaluation_uses_its_own_capacity():
    tight = CapacityPolicy(kind="fixed", factor=0.5)
    layer = make(
        num_experts=4, capacity=CapacityConfig(train=tight, eval=CapacityPolicy(kind="dropless")), init_std=1.0
    )
    x = torch.randn(40, 4)
    assert layer(x)[1].kept.max() == 5
    assert layer(x)[1].kept.sum() < 40
    assert layer.eval()(x)[1].kept.sum() == 40


def test_dropped_tokens_are_marked_and_get_nothing():
    layer = make(num_experts=4, capacity=CapacityConfig(train=CapacityPolicy(kind="fixed", factor=0.5)), init_std=1.0)
    y, stats = layer(torch.randn(40, 4))
    dropped = stats.expert_ids[:, 0] < 0
    assert 0 < int(dropped.sum()) == 40 - int(stats.kept.sum())
    assert not y[dropped].any()
    assert y[~dropped].any(-1).all()


@pytest.mark.parametrize("factor", [0.1, 0.6])
def test_no_slots_at_all_is_survived_in_both_layouts(factor):
    for dispatcher in ("ragged", "padded"):
        policy = CapacityPolicy(kind="fixed", factor=factor, min_slots=0)
        layer = make(num_experts=4, dispatcher=dispatcher, capacity=CapacityConfig(train=policy))
        x = torch.randn(3, 4, requires_grad=True)
        y, stats = layer(x)
        y.sum().backward()
        assert not y.any()
        assert stats.kept.sum() == 0
        assert not x.grad.any()


# ---------------------------------------------------------------------------------------------------- errors, plug-ins


def test_errors_say_what_to_do():
    with pytest.raises(ConfigError, match=r"moe\.router\.type='cosin' is unknown.*did you mean 'cosine'"):
        make(router=RouterConfig(type="cosin"))
    with pytest.raises(ConfigError, match=r"moe\.experts\.type='swish'.*'gelu', 'relu', 'swiglu'"):
        make(experts=ExpertConfig(type="swish"))
    with pytest.raises(ConfigError, match=r"moe\.dispatcher='padd' is unknown.*'padded'"):
        make(dispatcher="padd")
    with pytest.raises(RoutingError, match="width 5; it was made for dim=4"):
        make()(torch.randn(3, 5))


def test_parts_of_your_own():
    class Square(Activation):
        def value(self, pre: Tensor) -> Tensor:
            return pre.square()

    @register_expert("test-square")
    class SquareExperts(Experts):
        activation = Square()

    @register_router("test-first")
    class FirstRouter(Router):
        def score(self, x: Tensor) -> Tensor:
            return torch.arange(self.num_experts, 0, -1).to(x).expand(len(x), -1)

    @register_dispatcher("test-one-hot")
    class OneHot(Dispatcher):
        def slots(self, queues, capacity, policy):
            return int(queues.counts.max())

        def scatter(self, x, routing, plan):
            return ExpertRows(torch.einsum("tec,td->ecd", self.mask(routing, plan).to(x), x), plan.counts)

        def gather(self, rows, routing, plan):
            gates = torch.zeros_like(routing.probs).scatter(1, routing.expert_ids, routing.gates)
            return torch.einsum("tec,te,ecd->td", self.mask(routing, plan).to(rows), gates, rows)

        @staticmethod
        def mask(routing, plan):
            places = F.one_hot(routing.expert_ids * plan.slots + plan.slot, len(plan.counts) * plan.slots)
            return places.sum(1).view(len(routing.gates), -1, plan.slots)

    try:
        cfg = {"num_experts": 3, "top_k": 2, "experts": ExpertConfig(type="test-square"), "init_std": 1.0}
        cfg |= {"router": RouterConfig(type="test-first")}
        x = torch.randn(5, 4)
        theirs, ours = make(**cfg, dispatcher="test-one-hot"), make(**cfg)
        torch.testing.assert_close(theirs(x)[0], ours(x)[0])
        assert ours(x)[1].routed.tolist() == [5, 5, 0]
        with pytest.raises(ConfigError, match="'test-square' is registered already"):
            register_expert("test-square")(Experts)
    finally:
        for registry, name in ((EXPERTS, "test-square"), (ROUTERS, "test-first"), (DISPATCHERS, "test-one-hot")):
            registry._parts.pop(name)


# ---------------------------------------------------------------------------------------------------------- statistics


def test_statistics_of_micro_batches_add_up():
    layer = make(num_experts=4, top_k=2, init_std=1.0)
    x = torch.randn(10, 4)
    whole = layer(x)[1]
    parts = merge(layer(x[:3])[1], layer(x[3:])[1], keep_ids=True)
    assert torch.equal(parts.routed, whole.routed)
    assert torch.equal(parts.kept, whole.kept)
    assert torch.equal(parts.expert_ids, whole.expert_ids)
    assert int(parts.tokens) == 10
    torch.testing.assert_close(parts.entropy_sum, whole.entropy_sum)
    assert merge(whole, whole).expert_ids.shape == (0, 2)
    torch.testing.assert_close(merge(whole, whole).losses, whole.losses)
    assert merge(whole, whole).loss.requires_grad


def test_summary_by_hand():
    layer = make(num_experts=4, capacity=CapacityConfig(train=CapacityPolicy(kind="fixed", factor=1.0)))
    with torch.no_grad():
        layer.router.weight.zero_()
    _, stats = layer(torch.randn(8, 4))
    stats = merge(stats, layer(torch.randn(0, 4))[1])
    summary = summarise(stats)
    assert sum(summary["routed"]) == 8
    assert math.isclose(summary["token_entropy"], 1.0, rel_tol=1e-6)  # all experts alike to every token
    assert math.isclose(summary["losses"]["gshard"], 1.0, rel_tol=1e-6)
    skewed = type(stats)(
        routed=torch.tensor([6, 2, 0, 0]),
        kept=torch.tensor([4, 2, 0, 0]),
        tokens=torch.tensor(8),
        entropy_sum=torch.tensor(8 * math.log(2)),
        losses={},
        loss=torch.tensor(0.0),
        expert_ids=torch.zeros(0, 1, dtype=torch.int64),
    )
    summary = summarise(skewed)
    assert summary["drop_fraction"] == 0.25
    assert summary["max_over_mean"] == 3.0
    assert math.isclose(summary["token_entropy"], 0.5, rel_tol=1e-6)
    assert math.isclose(summary["load_entropy"], -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))
    empty = summarise(layer(torch.randn(0, 4))[1])
    assert empty["drop_fraction"] == empty["token_entropy"] == empty["load_entropy"] == empty["max_over_mean"] == 0


def test_empty_rows_of_the_padded_layout_are_zero():
    layer = make(num_experts=4, dispatcher="padded")
    x = torch.rand(9, 4) + 1
    routing, plan, _, _ = layer.assign(x, None)
    rows = layer.dispatcher.scatter(x, routing, plan).rows
    for expert, count in enumerate(plan.counts.tolist()):
        assert rows[expert, :count].all()
        assert not rows[expert, count:].any()


def test_padded_with_fixed_capacity_never_asks_for_data():
    """Meta tensors have shapes and no data: whatever would copy to the host fails on them."""
    policy = CapacityPolicy(kind="fixed", factor=1.0)
    cfg = MoEConfig(num_experts=4, top_k=2, dispatcher="padded", capacity=CapacityConfig(train=policy))
    layer = MoEMlp(cfg, dim=4, hidden_dim=6, device="meta")
    y, stats = layer(torch.empty(9, 4, device="meta"))
    assert y.shape == (9, 4)
    (y.sum() + stats.loss).backward()
    assert all(p.grad is not None for p in layer.parameters())
