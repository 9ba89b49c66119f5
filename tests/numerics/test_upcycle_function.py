"""An upcycled model computes, at step 0, what its dense parent computes, over all that an expert layer may be."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from swinmoe.checkpoint.upcycle import Upcycling, upcycle
from swinmoe.config import CapacityPolicy, ExpertConfig, MoEConfig, RouterConfig
from swinmoe.config.moe import CapacityConfig
from swinmoe.models import SwinTransformer, build_model, create_model
from swinmoe.models.build import preset_config

SHAPE = {"depths": (1, 2)}


def parent(preset: str = "swin_v1_mini_16_p2_w4", dtype: torch.dtype = torch.float64, **overrides) -> SwinTransformer:
    """A dense model whose every parameter, biases and res-post norms too, is far from 0."""
    dense = build_model(preset_config(preset, **SHAPE, moe=None, **overrides), seed=3, dtype=dtype)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng).to(dtype)
    return dense.eval()


def child(dense: SwinTransformer, moe: MoEConfig, seed: int = 1) -> SwinTransformer:
    cfg = replace(dense.config, moe=moe, moe_blocks=((), (0, 1)))
    sparse = build_model(cfg, seed=seed, dtype=dense.norm.weight.dtype).eval()
    with torch.no_grad():  # routers need not be fresh
        for name, parameter in sparse.named_parameters():
            if name.endswith("router.projector.bias"):
                parameter += 0.3
    return sparse


def images(dtype: torch.dtype = torch.float64, count: int = 12) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(2)).to(dtype)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest, over the largest value."""
    return float(((a - b).abs().max() / a.abs().max()).detach())


# (E, K, hidden_ratio, shared_expert_ratio): copies, finer experts, shared experts beside either
SHAPES = [
    (4, 1, 1.0, 0.0),
    (4, 2, 1.0, 0.0),
    (4, 4, 1.0, 0.0),
    (1, 1, 1.0, 0.0),
    (4, 1, 1.0, 1.0),  # the shared expert is half of the MLP
    (4, 2, 1.0, 0.25),
    (4, 2, 0.5, 0.0),
    (8, 4, 0.5, 0.0),
    (8, 4, 0.25, 0.0),
    (8, 8, 0.25, 0.0),
    (4, 1, 0.5, 0.5),  # the shared expert holds the other half
    (6, 3, 0.25, 0.25),  # three quarters in parts, one quarter shared
    (8, 4, 0.25, 0.25),  # four parts cover all, and the shared expert takes half of its quarter
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_step_zero_is_the_dense_model(router, shape):
    experts, top_k, ratio, shared = shape
    dense = parent()
    before = dense(images()).logits
    for score, normalize, bias_rate in itertools.product(("softmax", "sigmoid"), (False, True), (0.0, 0.001)):
        if bias_rate and ratio < 1 and not normalize:
            continue  # refused by name: see the unit tests
        sparse = child(
            dense,
            MoEConfig(
                num_experts=experts,
                top_k=top_k,
                router=RouterConfig(
                    type=router, score=score, normalize_gates=normalize, proj_dim=8, bias_update_rate=bias_rate
                ),
                experts=ExpertConfig(hidden_ratio=ratio),
                shared_expert_ratio=shared,
            ),
        )
        assert difference(before, sparse(images()).logits) > 1e-3, "an untouched sparse model is another function"
        upcycle(dense, sparse)
        assert difference(before, sparse(images()).logits) < 1e-11, (score, normalize, bias_rate)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("preset", ["swin_v1_mini_16_p2_w4", "swin_v2_mini_16_p2_w4", "swin_moe_mini_16_p2_w4_dense"])
def test_step_zero_in_float32_for_every_lineage(preset, top_k):
    dense = parent(preset, torch.float32)
    sparse = child(dense, MoEConfig(num_experts=8, top_k=top_k))
    upcycle(dense, sparse)
    assert difference(dense(images(torch.float32)).logits, sparse(images(torch.float32)).logits) < 1e-5


def test_microsofts_swin_moe_starts_from_its_dense_twin():
    """Frozen second biases, a dense model without them, gate noise, BPR and a capacity that drops nothing here."""
    sizes = {"embed_dim": 24, "depths": (1, 1, 2, 2), "num_classes": 5, "img_size": (96, 96), "window_size": (6, 6)}
    sparse = create_model("swin_moe_s_192_w12_e8", **sizes, moe_blocks=((), (), (1,), (1,)))
    moe = sparse.config.moe
    assert moe is not None and moe.capacity.eval.kind == "fixed" and moe.experts.fc2_bias == "frozen-zero"
    dense = build_model(preset_config("swin_moe_s_192_w12_dense", **sizes), seed=9).eval()
    upcycle(dense, sparse)
    assert all(not layer.experts.fc2_bias.any() for layer in sparse.moe_layers().values())
    x = torch.randn(2, 3, 96, 96)
    dropping = sparse.eval()(x)
    wide = CapacityConfig(eval=CapacityPolicy(kind="dropless"))
    for layer in sparse.moe_layers().values():
        layer.cfg = replace(layer.cfg, capacity=wide)
    whole = sparse(x)
    before = dense(x).logits
    assert difference(before, whole.logits) < 1e-5
    assert any(bool((s.kept < s.routed).any()) for s in dropping.routing.values())
    assert difference(before, dropping.logits) > 1e-5, "dropped choices are missing, and the test sees it"


def test_an_undecided_router_spreads_tokens_over_experts():
    """Equal gates must not mean one expert for all: choices follow the direction of the router's weights."""
    for router in ("linear", "cosine"):
        dense = parent(dtype=torch.float32)
        sparse = child(dense, MoEConfig(num_experts=4, top_k=1, router=RouterConfig(type=router, proj_dim=8)))
        upcycle(dense, sparse)
        ids = torch.cat([s.expert_ids for s in sparse(images(torch.float32, 32)).routing.values()])
        assert torch.bincount(ids.flatten(), minlength=4).count_nonzero() >= 3


def test_an_undecided_router_learns():
    for router in ("linear", "cosine"):
        dense = parent()
        sparse = child(dense, MoEConfig(num_experts=4, top_k=1, router=RouterConfig(type=router, proj_dim=8)))
        upcycle(dense, sparse, Upcycling(noise=0.1))
        (sparse(images()).logits.square().sum()).backward()
        for layer in sparse.moe_layers().values():
            own = layer.router.weight if router == "linear" else layer.router.sim_matrix
            assert own.grad is not None and own.grad.isfinite().all()
            assert 1e-6 < own.grad.norm() / layer.experts.fc1_weight.grad.norm() < 1e6


def test_groups_of_parts_are_chosen_whole_and_cover_the_mlp():
    dense = parent()
    sparse = child(dense, MoEConfig(num_experts=8, top_k=4, experts=ExpertConfig(hidden_ratio=0.25)))
    upcycle(dense, sparse, Upcycling(shuffle=True))
    for name, stats in sparse(images()).routing.items():
        assert torch.equal(stats.expert_ids.sort(1).values // 4, (stats.expert_ids[:, :1] // 4).expand(-1, 4)), name
        layer = sparse.moe_layers()[name]
        whole = dense.get_submodule(name).fc1.weight
        first, second = layer.experts.fc1_weight.unflatten(0, (2, 4)).flatten(1, 2)
        assert not torch.equal(first, second), "each group shuffles in its own way"
        for group in (first, second):
            assert torch.equal(group[group[:, 0].argsort()], whole[whole[:, 0].argsort()])


def test_noise_and_fresh_units_change_the_function_by_as_much_as_asked():
    dense = parent()
    before = dense(images()).logits
    moe = MoEConfig(num_experts=4, top_k=2)
    found = []
    for how in (Upcycling(noise=1e-3), Upcycling(noise=1e-1), Upcycling(drop=0.5)):
        sparse = child(dense, moe)
        upcycle(dense, sparse, how)
        found.append(difference(before, sparse(images()).logits))
    assert 1e-6 < found[0] < 1e-2 < found[1] * 10
    assert found[2] > 1e-2
