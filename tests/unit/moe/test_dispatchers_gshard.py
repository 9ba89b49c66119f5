"""The einsum dispatcher: masks by hand, gradients by finite differences, and the other layouts as its equals."""

import pytest
import torch

from swinmoe.config import CapacityConfig, CapacityPolicy, MoEConfig, RouterConfig
from swinmoe.moe import MoEMlp, Routing, dispatch
from swinmoe.moe.dispatchers.gshard import GShardDispatcher, combine_weights

DOUBLE = torch.float64


def routing_of(expert_ids: list[list[int]], gates: list[list[float]], num_experts: int) -> Routing:
    ids = torch.tensor(expert_ids)
    probs = torch.zeros(len(ids), num_experts, dtype=DOUBLE).scatter(1, ids, torch.tensor(gates, dtype=DOUBLE))
    return Routing(ids, torch.tensor(gates, dtype=DOUBLE), probs.log(), probs.log(), probs, 0.0)


def make(dispatcher: str, kind: str, *, top_k: int = 2, num_experts: int = 4, prioritized: bool = False) -> MoEMlp:
    policy = CapacityPolicy(kind=kind, factor=0.75)
    cfg = MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        dispatcher=dispatcher,
        router=RouterConfig(batch_prioritized=prioritized, normalize_gates=True),
        capacity=CapacityConfig(train=policy, eval=policy),
    )
    return MoEMlp(cfg, dim=4, hidden_dim=6, init_std=1.0, dtype=DOUBLE)


def test_masks_by_hand():
    """Three tokens, two experts, two choices, two slots: the second choice of the last token finds expert 0 full."""
    routing = routing_of([[0, 1], [0, 1], [1, 0]], [[0.6, 0.4], [0.7, 0.3], [0.9, 0.1]], num_experts=2)
    queues = dispatch.queue(routing, 2, 2)
    plan = dispatch.plan(routing, queues, slots=2)
    weights = combine_weights(routing.gates, routing, plan)
    # Expert 0 serves first choices of tokens 0 and 1; expert 1 that of token 2, then the second choice of token 0.
    by_hand = torch.tensor([[[0.6, 0], [0, 0.4]], [[0, 0.7], [0, 0]], [[0, 0], [0.9, 0]]], dtype=DOUBLE)
    assert torch.equal(weights, by_hand)
    x = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]], dtype=DOUBLE)
    rows = GShardDispatcher().scatter(x, routing, plan).rows
    assert torch.equal(rows, torch.stack([x[[0, 1]], x[[2, 0]]]))
    y = GShardDispatcher().gather(rows, routing, plan)
    torch.testing.assert_close(y, x * torch.tensor([[1.0], [0.7], [0.9]], dtype=DOUBLE))


@pytest.mark.parametrize("kind", ["fixed", "bounded", "dropless"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("prioritized", [False, True])
def test_equals_the_other_layouts(kind, top_k, prioritized):
    x = torch.randn(19, 4, dtype=DOUBLE, requires_grad=True)
    results = {}
    for dispatcher in ("gshard", "padded", "ragged"):
        layer = make(dispatcher, kind, top_k=top_k, prioritized=prioritized)
        y, stats = layer(x)
        loss = y.square().sum() + stats.loss
        results[dispatcher] = [y, *torch.autograd.grad(loss, [x, *layer.parameters()])]
        assert (stats.kept.sum() < stats.routed.sum()) == (kind != "dropless")
    for other in ("padded", "ragged"):
        torch.testing.assert_close(results["gshard"], results[other], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["fixed", "dropless"])
def test_gradients_by_finite_differences(kind):
    layer = make("gshard", kind, num_experts=3)
    x = torch.randn(6, 4, dtype=DOUBLE, requires_grad=True)
    routing, plan, _, _ = layer.assign(x, None)
    routing = Routing(**{**vars(routing), "gates": routing.gates.detach().requires_grad_()})

    def there_and_back(x, gates):
        routed = Routing(**{**vars(routing), "gates": gates})
        rows = layer.dispatcher.scatter(x, routed, plan).rows
        return layer.dispatcher.gather(rows.square(), routed, plan)

    assert torch.autograd.gradcheck(there_and_back, (x, routing.gates))
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], (x,))


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_tokens_and_no_slots(tokens):
    policy = CapacityPolicy(kind="fixed", factor=0.1, min_slots=0)
    layer = MoEMlp(
        MoEConfig(num_experts=4, dispatcher="gshard", capacity=CapacityConfig(train=policy)), dim=4, hidden_dim=6
    )
    y, stats = layer(torch.randn(tokens, 4))
    (y.sum() + stats.loss).backward()
    assert y.shape == (tokens, 4)
    assert not y.any()
    assert all(p.grad is not None for p in layer.parameters())


def test_autocast_gives_what_the_padded_layout_gives():
    x = torch.randn(19, 4)
    outputs = []
    for dispatcher in ("gshard", "padded"):
        layer = make(dispatcher, "fixed").float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = layer(x)
        assert y.dtype == torch.bfloat16
        outputs.append(y.float())
    torch.testing.assert_close(*outputs, atol=0, rtol=2**-7)


def test_no_data_is_asked_for():
    """Meta tensors have shapes and no data: whatever would copy to the host fails on them."""
    policy = CapacityPolicy(kind="fixed", factor=1.0)
    cfg = MoEConfig(num_experts=4, top_k=2, dispatcher="gshard", capacity=CapacityConfig(train=policy))
    layer = MoEMlp(cfg, dim=4, hidden_dim=6, device="meta")
    y, stats = layer(torch.empty(9, 4, device="meta"))
    (y.sum() + stats.loss).backward()
    assert all(p.grad is not None for p in layer.parameters())
