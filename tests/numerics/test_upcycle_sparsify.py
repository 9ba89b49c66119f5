"""Other people's models with experts: the same function at step 0, gradients, statistics, recomputation."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from swinmoe.checkpoint.sparsify import SparseMlp, collect_routing, sparsify
from swinmoe.checkpoint.upcycle import Upcycling
from swinmoe.config import BalanceLossConfig, ExpertConfig, MoEConfig, RouterConfig
from swinmoe.errors import ConfigError, RoutingError
from swinmoe.models import create_model
from swinmoe.moe import MoEMlp

SMALL_SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}


def vit(**kw) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7, **kw)


def swin_v1() -> nn.Module:
    return timm.create_model("swin_tiny_patch4_window7_224", window_size=4, num_classes=7, **SMALL_SWIN)


def swin_v2() -> nn.Module:
    return timm.create_model("swinv2_tiny_window8_256", window_size=4, num_classes=7, **SMALL_SWIN)


def torchvision_swin(v2: bool = False) -> nn.Module:
    sizes = {"patch_size": [2, 2], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    block = torchvision.models.swin_transformer.SwinTransformerBlockV2 if v2 else None
    merging = torchvision.models.swin_transformer.PatchMergingV2 if v2 else None
    extra = {"block": block, "downsample_layer": merging} if v2 else {}
    return torchvision.models.SwinTransformer(**sizes, **extra, num_classes=7)


class Written(nn.Module):
    """By hand: a functional activation, names of its own, one dropout used twice."""

    def __init__(self, activation=F.gelu, drop: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(12, 40), nn.Linear(40, 12), nn.Dropout(drop)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.dropout(self.activation(self.up(x)))))


def wrapped(mlp: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(2), nn.Linear(1024, 12), mlp, nn.Linear(12, 7))


MODELS = {
    "timm vit": (vit, ["blocks.1", "blocks.3.mlp", "blocks.1?.mlp"], 64, 4),
    "timm swin v1": (swin_v1, ["layers.1.blocks.*.mlp"], 32, 2),
    "timm swin v2": (swin_v2, ["layers.1"], 32, 2),
    "torchvision swin v1": (torchvision_swin, "features.3", 32, 2),
    "torchvision swin v2": (lambda: torchvision_swin(v2=True), "features.3.1.mlp", 32, 1),
    "by hand": (lambda: wrapped(Written()), "2", 32, 1),
    "timm swiglu": (lambda: vit(mlp_layer=timm.layers.SwiGLU, act_layer=nn.SiLU), ["blocks.[01]"], 64, 2),
    "timm packed swiglu": (lambda: vit(mlp_layer=timm.layers.SwiGLUPacked, act_layer=nn.SiLU), ["blocks.11"], 64, 1),
}


def build(name: str) -> tuple[nn.Module, Tensor, list[str] | str, int, str]:
    make, blocks, side, count = MODELS[name]
    torch.manual_seed(1)
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    kind = "swiglu" if "swiglu" in name else "gelu"
    return model, torch.randn(3, 3, side, side, dtype=torch.float64), blocks, count, kind


@pytest.mark.parametrize(("top_k", "ratio", "noise"), [(1, 1.0, 0.0), (2, 1.0, 1.0), (4, 0.5, 0.0)])
@pytest.mark.parametrize("name", MODELS)
def test_the_function_is_what_it_was_and_gradients_flow(name, top_k, ratio, noise):
    model, x, blocks, count, kind = build(name)
    before = model(x).detach()
    cfg = MoEConfig(
        num_experts=4,
        top_k=top_k,
        experts=ExpertConfig(hidden_ratio=ratio, type=kind),
        router=RouterConfig(noise=noise, normalize_gates=top_k == 2),
    )
    assert sparsify(model, blocks, cfg) is model
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseMlp)}
    assert len(layers) == count
    with collect_routing(model) as routing:
        after = model(x)
    torch.testing.assert_close(after.detach(), before, rtol=0, atol=1e-10 * float(before.abs().max()))
    assert list(routing.layers) == list(layers)
    assert all(int(stats.routed.sum()) == int(stats.tokens) * top_k for stats in routing.layers.values())

    model.train()
    with collect_routing(model) as routing:
        loss = model(x).square().mean()
    (loss + routing.loss).backward()
    for layer in layers.values():
        for parameter in layer.parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all()
            assert parameter.grad.any()


def test_copies_learn_together_what_the_dense_mlp_would():
    """With all experts visited, one SGD step of rate E on each copy is the dense model's own step on fc1."""
    torch.manual_seed(0)
    x = torch.randn(5, 9, 12, dtype=torch.float64)
    dense = nn.Sequential(Written()).double()
    sparse = nn.Sequential(Written()).double()
    sparse.load_state_dict(dense.state_dict())
    cfg = MoEConfig(num_experts=4, top_k=4, losses=BalanceLossConfig())
    sparsify(sparse, "0", cfg)
    for model in (dense, sparse):
        model(x).square().sum().backward()
    experts = sparse[0].moe.experts
    torch.testing.assert_close(experts.fc1_weight.grad.sum(0), dense[0].up.weight.grad)
    torch.testing.assert_close(experts.fc2_weight.grad.sum(0), dense[0].down.weight.grad)


def test_dropout_stays_where_it_was():
    cfg = MoEConfig(num_experts=2)
    model = sparsify(nn.Sequential(Written(drop=0.25)), "0", cfg)
    assert (model[0].moe.experts.dropout, model[0].drop.p) == (0.25, 0.25)
    model = sparsify(nn.Sequential(timm.layers.Mlp(8, 16, drop=(0.1, 0.2))), "0", cfg)
    assert (model[0].moe.experts.dropout, model[0].drop.p) == (0.1, 0.2)
    own = MoEConfig(num_experts=2, experts=ExpertConfig(dropout=0.4))
    model = sparsify(nn.Sequential(timm.layers.Mlp(8, 16, drop=(0.1, 0.2))), "0", own)
    assert (model[0].moe.experts.dropout, model[0].drop.p) == (0.4, 0.2)


def test_recomputed_activations_see_the_same_gate_noise():
    model, x, _, _, _ = build("timm vit")
    cfg = MoEConfig(num_experts=4, top_k=2, router=RouterConfig(noise=4.0))
    sparsify(model, ["blocks.2", "blocks.5"], cfg, Upcycling(noise=0.5))
    model.train()
    gradients = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        torch.manual_seed(11)
        with collect_routing(model) as routing:
            loss = model(x).square().mean()
        (loss + routing.loss).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_several_passes_are_taken_together():
    model, x, blocks, _, _ = build("timm swin v1")
    sparsify(model, blocks, MoEConfig(num_experts=4))
    with collect_routing(model) as both:
        model(x[:1]), model(x[1:])
    with collect_routing(model) as whole:
        model(x)
    for name, stats in whole.layers.items():
        assert torch.equal(both.layers[name].routed, stats.routed)
    assert not any(layer._forward_hooks for layer in model.modules() if isinstance(layer, MoEMlp))


def test_losses_over_layers_add_up_or_are_averaged():
    for over, expected in (("sum", 2.0), ("mean", 1.0)):
        model, x, blocks, count, _ = build("timm swin v1")
        assert count == 2
        sparsify(model, blocks, MoEConfig(num_experts=4, losses=BalanceLossConfig(gshard=1.0, over_layers=over)))
        with collect_routing(model) as routing:
            model(x)
        # equal probabilities: E·Σ_e (1/E)·f_e = 1 for each layer
        assert routing.loss.item() == pytest.approx(expected)


def test_a_sparsified_model_saves_and_loads():
    model, x, blocks, _, _ = build("timm swin v2")
    sparsify(model, blocks, MoEConfig(num_experts=4), Upcycling(noise=0.3))
    again, *_ = build("timm swin v2")
    sparsify(again, blocks, MoEConfig(num_experts=4), seed=5)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


class Normed(Written):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.layer_norm(x, (12,)))


@pytest.mark.parametrize(
    ("mlp", "cfg", "message"),
    [
        (Written(nn.GELU(approximate="tanh")), MoEConfig(), "computes nothing that experts do"),
        (Written(F.silu), MoEConfig(), r"\['gelu', 'relu', 'swiglu'"),
        (Normed(), MoEConfig(), "computes nothing that experts do"),
        (Written(F.relu), MoEConfig(), "set that to 'relu'"),
        (Written(), MoEConfig(experts=ExpertConfig(hidden_ratio=0.3)), "no equal parts of an MLP of 40"),
        (Written(), MoEConfig(experts=ExpertConfig(fc2_bias="none")), "fc2_bias='learned'"),
        (Written(), MoEConfig(experts=ExpertConfig(fc1_bias=False)), "fc1_bias=true"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_changes(mlp, cfg, message):
    model = nn.Sequential(Written(), mlp)
    with pytest.raises(ConfigError, match=message):
        sparsify(model, ["0", "1"], cfg)
    assert type(model[0]) is Written


def test_names_are_explained():
    model = swin_v1()
    with pytest.raises(ConfigError, match=r"its MLPs are layers.0.blocks.0.mlp, layers.0"):
        sparsify(model, "blocks.1", MoEConfig())
    with pytest.raises(ConfigError, match="no names"):
        sparsify(model, [], MoEConfig())
    with pytest.raises(ConfigError, match="two or three linear layers"):
        sparsify(nn.Sequential(nn.Linear(3, 3)), "0", MoEConfig())
    with pytest.raises(ConfigError, match="meta device"), torch.device("meta"):
        sparsify(nn.Sequential(Written()), "0", MoEConfig())
    with pytest.raises(ConfigError, match=r"swinmoe\.upcycle"):
        sparsify(create_model("swin_micro"), "layers.1", MoEConfig())
    with pytest.raises(ConfigError, match="sparsify it first"), collect_routing(model):
        pass
    sparsify(model, "layers.1", MoEConfig())
    with collect_routing(model) as routing:
        pass
    with pytest.raises(RoutingError, match="no expert layer has run"):
        _ = routing.loss
