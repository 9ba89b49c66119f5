"""Experts kept, pruned, grown and merged, against what a model must then compute."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

from swinmoe.checkpoint.experts_edit import grow_experts, keep_experts, prune_experts
from swinmoe.checkpoint.experts_merge import merge_experts
from swinmoe.checkpoint.sparsify import collect_routing, sparsify
from swinmoe.checkpoint.upcycle import Upcycling, upcycle
from swinmoe.checkpoint.usage import measure_usage
from swinmoe.config import ExpertConfig, MoEConfig, RouterConfig
from swinmoe.errors import ConfigError, RoutingError
from swinmoe.models import SwinTransformer, build_model
from swinmoe.models.build import preset_config
from swinmoe.moe import MoEMlp


def images(count: int = 12) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(2)).double()


def model_of(moe: MoEConfig | None, seed: int = 3) -> SwinTransformer:
    """As if trained: every parameter far from its initial value, experts all different."""
    cfg = preset_config("swin_v1_mini_16_p2_w4", depths=(1, 2), moe=moe, moe_blocks=((), (0, 1)))
    model = build_model(cfg, seed=seed, dtype=torch.float64)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=rng).double()
        for buffer in (b for name, b in model.named_buffers() if name.endswith("expert_bias")):
            buffer += 0.02 * torch.randn(buffer.shape, generator=rng)
    return model.eval()


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


ROUTERS = [
    RouterConfig(type=kind, score=score, normalize_gates=normalize, proj_dim=8, bias_update_rate=rate)
    for kind, score, normalize, rate in itertools.product(
        ("linear", "cosine"), ("softmax", "sigmoid"), (False, True), (0.0, 0.001)
    )
]


def naive(layer: MoEMlp, x: Tensor, experts: list[int]) -> Tensor:
    """Σ gate·expert over some of a layer's experts, token by token, from the definition."""
    logits = layer.router.score(x)[:, experts]
    probs = logits.softmax(-1) if layer.router.cfg.score == "softmax" else logits.sigmoid()
    bias = layer.router.expert_bias
    ranking = logits if bias is None else probs + bias[experts]
    y = torch.zeros_like(x)
    own = layer.experts
    for t, row in enumerate(x):
        best = sorted(range(len(experts)), key=lambda e: -float(ranking[t, e]))[: layer.top_k]
        gates = [probs[t, e] for e in best]
        total = sum(gates) if layer.router.cfg.normalize_gates and layer.top_k > 1 else 1.0
        for e, gate in zip(best, gates, strict=True):
            fc1, b1, fc2, b2 = (w[experts[e]] for w in (own.fc1_weight, own.fc1_bias, own.fc2_weight, own.fc2_bias))
            y[t] += gate / total * (fc2 @ nn.functional.gelu(fc1 @ row + b1) + b2)
    return y


@pytest.mark.parametrize("top_k", [1, 2])
def test_kept_experts_are_chosen_as_if_the_others_were_not_there(top_k):
    for router in ROUTERS:
        model = model_of(MoEConfig(num_experts=6, top_k=top_k, router=router))
        kept = keep_experts(model, {"layers.1.blocks.0.mlp": (4, 0, 3), "layers.1.blocks.1.mlp": (1, 2, 5)})
        assert kept.config.moe is not None and kept.config.moe.num_experts == 3
        for name, ids in (("layers.1.blocks.0.mlp", [4, 0, 3]), ("layers.1.blocks.1.mlp", [1, 2, 5])):
            x = torch.randn(20, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                old, new = model.moe_layers()[name], kept.moe_layers()[name]
                y, stats = new(x)
                torch.testing.assert_close(y, naive(old, x, ids), rtol=1e-10, atol=1e-12)
            assert stats.routed.shape == (3,)


def test_all_experts_in_another_order_are_the_same_model():
    for router in ROUTERS:
        model = model_of(MoEConfig(num_experts=4, top_k=2, router=router, shared_expert_ratio=0.5))
        turned = keep_experts(model, (2, 0, 3, 1))
        assert difference(model(images()).logits, turned(images()).logits) < 1e-12
        assert keep_experts(turned, (1, 3, 0, 2)).state_dict().keys() == model.state_dict().keys()
        for name, tensor in keep_experts(turned, (1, 3, 0, 2)).state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name


def test_pruning_keeps_the_busiest_and_changes_nothing_where_the_others_were_idle():
    router = RouterConfig(normalize_gates=True)
    model = model_of(MoEConfig(num_experts=6, top_k=2, router=router))
    with torch.no_grad():
        for layer in model.moe_layers().values():  # nobody chooses experts 1 and 4
            layer.router.weight[[1, 4]] = layer.router.weight[[0, 0]] - 100 * layer.router.weight.abs().max()
            layer.router.weight[:, 0] += 0.5
    x = images()
    with measure_usage(model) as usage:
        before = model(x)
    idle = {name: (found.chosen == 0).nonzero().flatten().tolist() for name, found in usage.items()}
    for name, stats in before.routing.items():
        assert torch.equal(usage[name].chosen.long(), stats.routed)
        assert usage[name].tokens == int(stats.tokens)
        assert usage[name].gates.sum().item() == pytest.approx(usage[name].tokens)  # normalised
    pruned = prune_experts(model, 3, usage)
    for name, layer in pruned.moe_layers().items():
        top = sorted(usage[name].chosen.argsort(descending=True)[:3].tolist())
        assert torch.equal(layer.experts.fc1_weight, model.moe_layers()[name].experts.fc1_weight[top])
        assert not set(top) & set(idle[name]) or len(idle[name]) > 3
    few = min(len(names) for names in idle.values())
    if few:
        same = prune_experts(model, 6 - few, usage)
        assert difference(before.logits, same(x).logits) < 1e-12


@pytest.mark.parametrize("shared", [0.0, 0.5])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_growing_keeps_the_function(top_k, shared):
    for router, copies in itertools.product(ROUTERS, (2, 3)):
        model = model_of(MoEConfig(num_experts=3, top_k=top_k, router=router, shared_expert_ratio=shared))
        before = model(images())
        grown = grow_experts(model, 3 * copies)
        after = grown(images())
        assert grown.config.moe is not None and grown.config.moe.num_experts == 3 * copies
        assert grown.config.moe.top_k == (1 if top_k == 1 else top_k * copies)
        assert difference(before.logits, after.logits) < (1e-5 if top_k == 1 else 1e-12), (router, copies)
        assert difference(before.logits, model(images()).logits) == 0, "the original stays as it is"
        if top_k == 1:  # tokens of each expert are spread over its copies
            for name, stats in after.routing.items():
                old, new = before.routing[name].routed, stats.routed.view(copies, 3)
                assert torch.equal(new.sum(0), old)
                assert bool((new.max(0).values < old)[old > 20].all())


def test_growing_by_load_copies_the_busiest():
    model = model_of(MoEConfig(num_experts=4, top_k=1, router=RouterConfig(score="sigmoid")))
    with measure_usage(model) as usage:
        before = model(images()).logits
    grown = grow_experts(model, 6, usage)  # sigmoid gates are not shared, so any number keeps the function
    assert difference(before, grown(images()).logits) < 1e-5
    for name, layer in grown.moe_layers().items():
        busiest = sorted(usage[name].chosen.argsort(descending=True)[:2].tolist())
        old = model.moe_layers()[name].experts
        assert torch.equal(layer.experts.fc1_weight, torch.cat((old.fc1_weight, old.fc1_weight[busiest])))
    noisy = grow_experts(model, 6, usage, noise=0.1)
    for name, layer in noisy.moe_layers().items():
        assert torch.equal(layer.experts.fc1_weight[:4], model.moe_layers()[name].experts.fc1_weight)
        assert not torch.equal(layer.experts.fc1_weight[4:], grown.moe_layers()[name].experts.fc1_weight[4:])


def test_growth_that_cannot_keep_the_function_is_refused_unless_asked_for():
    model = model_of(MoEConfig(num_experts=4, top_k=2))
    with pytest.raises(ConfigError, match="use a multiple such as 8 or 12, or preserve=False"):
        grow_experts(model, 6)
    grown = grow_experts(model, 6, preserve=False)
    assert (grown.config.moe.num_experts, grown.config.moe.top_k) == (6, 2)
    assert grown(images()).logits.isfinite().all()
    with pytest.raises(ConfigError, match="cannot grow to 4"):
        grow_experts(model, 4)


MERGES = [(1.0, 0.0), (0.5, 0.0), (0.25, 0.0), (0.5, 0.5), (1.0, 1.0), (0.25, 0.25)]


@pytest.mark.parametrize(("ratio", "shared"), MERGES)
@pytest.mark.parametrize("how", ["average", "usage"])
def test_merging_what_was_upcycled_gives_the_dense_model_back(how, ratio, shared):
    dense = model_of(None)
    for router in ROUTERS:
        parts = round((1 - (shared if shared < 1 and ratio == shared == 0.5 else 0)) / ratio)
        cfg = MoEConfig(
            num_experts=2 * parts,
            top_k=parts,
            router=router,
            experts=ExpertConfig(hidden_ratio=ratio),
            shared_expert_ratio=shared,
        )
        if router.bias_update_rate and parts > 1 and not router.normalize_gates:
            continue  # refused by upcycling
        sparse = build_model(replace(dense.config, moe=cfg), seed=8, dtype=torch.float64).eval()
        upcycle(dense, sparse)
        usage = None
        if how == "usage" or not (router.normalize_gates and parts > 1):
            with measure_usage(sparse) as usage:
                sparse(images())
        merged = merge_experts(sparse, how, usage)
        assert merged.config == dense.config
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(tensor, dense.state_dict()[name], rtol=0, atol=1e-10, msg=name)


def test_merging_by_usage_weighs_experts_by_their_gates():
    model = model_of(MoEConfig(num_experts=3, top_k=2))
    with measure_usage(model) as usage:
        model(images())
    merged = merge_experts(model, "usage", usage)
    for name, layer in model.moe_layers().items():
        gates = usage[name].gates / usage[name].tokens
        fc1 = sum(g * w for g, w in zip(gates, layer.experts.fc1_weight, strict=True)) / gates.sum()
        fc2 = sum(g * w for g, w in zip(gates, layer.experts.fc2_weight, strict=True))
        b2 = sum(g * w for g, w in zip(gates, layer.experts.fc2_bias, strict=True))
        mlp = merged.get_submodule(name)
        torch.testing.assert_close(mlp.fc1.weight, fc1)
        torch.testing.assert_close(mlp.fc2.weight, fc2)
        torch.testing.assert_close(mlp.fc2.bias, b2)


def test_foreign_models_are_edited_alike_and_become_dense_again():
    torch.manual_seed(0)
    dense = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).double().eval()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    before = dense(x).detach()
    keys = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    cfg = MoEConfig(num_experts=4, top_k=2, router=RouterConfig(normalize_gates=True))
    sparse = sparsify(dense, ["blocks.3", "blocks.7"], cfg)
    grown = grow_experts(sparse, 8)
    with collect_routing(grown) as routing:
        assert difference(before, grown(x)) < 1e-10
    assert all(stats.routed.shape == (8,) for stats in routing.layers.values())
    kept = keep_experts(grown, (7, 0, 5, 2))
    assert difference(before, kept(x)) < 1e-10
    again = merge_experts(kept)
    assert again.state_dict().keys() == keys.keys()
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, keys[name], rtol=0, atol=1e-12)
    assert difference(before, again(x)) < 1e-10


def test_edited_models_train():
    model = model_of(MoEConfig(num_experts=4, top_k=1, experts=ExpertConfig(fc2_bias="frozen-zero")))
    model.moe_layers()["layers.1.blocks.0.mlp"].router.weight.requires_grad_(False)
    with measure_usage(model) as usage:
        model(images())
    for edited in (keep_experts(model, (0, 2)), grow_experts(model, 8), prune_experts(model, 2, usage)):
        edited.train()
        out = edited(images())
        (out.logits.square().mean() + out.aux_loss).backward()
        for name, parameter in edited.named_parameters():
            if name.endswith("fc2_bias") or name == "layers.1.blocks.0.mlp.router.weight":
                assert not parameter.requires_grad, name
            else:
                assert parameter.grad is not None, name


def test_refusals():
    model = model_of(MoEConfig(num_experts=4, top_k=2))
    with pytest.raises(ConfigError, match=r"experts 0 to 3; \[0, 4\] names \[4\]"):
        keep_experts(model, (0, 4))
    with pytest.raises(ConfigError, match="some of them twice"):
        keep_experts(model, (1, 1))
    with pytest.raises(ConfigError, match="visits 2 experts per token, and 1 would be left"):
        keep_experts(model, (1,))
    with pytest.raises(ConfigError, match=r"were named for layers \['x'\]"):
        keep_experts(model, {"x": (1,)})
    with pytest.raises(ConfigError, match="one number of experts"):
        keep_experts(model, {"layers.1.blocks.0.mlp": (0, 1), "layers.1.blocks.1.mlp": (0, 1, 2)})
    with measure_usage(model) as usage:
        model(images())
    with pytest.raises(ConfigError, match=r"pruned to 2 \.\. 4, not to 1"):
        prune_experts(model, 1, usage)
    with pytest.raises(RoutingError, match="measure this very model"):
        prune_experts(model, 2, {})
    with pytest.raises(ConfigError, match="measured on data"):
        merge_experts(model)
    with pytest.raises(ConfigError, match="no experts to edit"):
        keep_experts(model_of(None), (1,))
    with pytest.raises(RoutingError, match="seen a token"), measure_usage(model):
        pass
    gated = model_of(MoEConfig(num_experts=4, top_k=4, experts=ExpertConfig(type="swiglu")))
    with pytest.raises(ConfigError, match="of type 'gelu'"):
        merge_experts(gated)


def test_merging_experts_that_noise_has_parted_is_close_to_the_parent():
    """The average of noisy copies is nearer to the parent than any of them."""
    dense = model_of(None)
    cfg = MoEConfig(num_experts=8, top_k=2, router=RouterConfig(normalize_gates=True))
    sparse = build_model(replace(dense.config, moe=cfg), seed=8, dtype=torch.float64).eval()
    upcycle(dense, sparse, Upcycling(noise=0.1))
    target = dense(images()).logits
    alone = grow_free(sparse)
    assert difference(target, merge_experts(sparse)(images()).logits) < 0.7 * difference(target, alone)


def grow_free(sparse: SwinTransformer) -> Tensor:
    return merge_experts(keep_experts(sparse, (0, 1)))(images()).logits
