"""The model's contract: what goes in and out, and what stays the same under copying, casting and resizing."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from swinmoe.config import (
    BalanceLossConfig,
    CapacityConfig,
    CapacityPolicy,
    ExpertConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
)
from swinmoe.errors import ConfigError
from swinmoe.models import SwinOutput, SwinTransformer, build_model, create_model

TINY: dict[str, Any] = {
    "img_size": (16, 16),
    "patch_size": (2, 2),
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (1, 2),
    "window_size": (4, 4),
    "num_classes": 3,
    "res_post_norm_init": 0.5,
}


def tiny(style: str = "v2", **over: Any) -> SwinTransformer:
    return build_model(ModelConfig(**{"style": style, **TINY, **over}), dtype=torch.float64).eval()


def sparse(**over: Any) -> SwinTransformer:
    return tiny(**{"moe": MoEConfig(num_experts=4), "moe_blocks": ((1,), (0, 1)), **over})


IMAGES = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_dense_output() -> None:
    model = tiny()
    out = model(IMAGES)
    assert isinstance(out, SwinOutput)
    assert out.logits.shape == (2, 3)
    assert out.features.shape == (2, model.num_features) == (2, 16)
    assert out.routing == {}
    assert out.aux_loss.shape == () and float(out.aux_loss) == 0
    assert torch.equal(model.head(out.features), out.logits)
    assert len(pytree.tree_leaves(out)) == 3  # a pytree: wrappers that look for tensors find them


def test_sparse_output_names_its_layers() -> None:
    model = sparse()
    out = model(IMAGES)
    names = ["layers.0.blocks.1.mlp", "layers.1.blocks.0.mlp", "layers.1.blocks.1.mlp"]
    assert list(out.routing) == names == list(model.moe_layers())
    assert [int(stats.tokens) for stats in out.routing.values()] == [128, 32, 32]
    assert out.routing[names[0]].expert_ids.shape == (128, 1)
    assert torch.equal(out.aux_loss, torch.stack([stats.loss for stats in out.routing.values()]).sum())
    assert float(out.aux_loss.detach()) > 0


def test_auxiliary_losses_may_be_averaged() -> None:
    losses = {}
    for kind in ("sum", "mean"):
        moe = MoEConfig(num_experts=4, losses=BalanceLossConfig(gshard=0.01, over_layers=kind))
        losses[kind] = float(sparse(moe=moe)(IMAGES).aux_loss.detach())
    assert losses["sum"] == pytest.approx(3 * losses["mean"], rel=1e-6)


def test_encode_gives_every_stage_before_merging() -> None:
    model = tiny(img_size=(20, 12))
    maps = model.encode(torch.randn(1, 3, 20, 12, dtype=torch.float64))
    assert [m.shape for m in maps] == [(1, 8, 10, 6), (1, 16, 5, 3)]
    assert [(f["num_chs"], f["reduction"]) for f in model.feature_info] == [(8, 2), (16, 4)]
    images = torch.randn(1, 3, 20, 12, dtype=torch.float64)
    last = model.norm(model.encode(images)[-1].permute(0, 2, 3, 1)).mean((1, 2))
    assert torch.equal(model.head(last), model(images).logits)


@pytest.mark.parametrize("style", ["v1", "v2", "swin_moe"])
def test_any_size_and_any_batch(style: str) -> None:
    model = tiny(style)
    for batch, size in ((1, (2, 2)), (1, (3, 50)), (3, (17, 29)), (0, (16, 16))):
        assert model(torch.randn(batch, 3, *size, dtype=torch.float64)).logits.shape == (batch, 3)


def test_an_empty_batch_has_a_gradient_of_zero() -> None:
    for model in (tiny(), sparse()):
        model.train()
        out = model(IMAGES[:0])
        (out.logits.sum() + out.aux_loss).backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 1, 16), "smaller than one patch of 2x2"), ((1, 1, 16, 16), "3 channels"), ((3, 16, 16), "batch, 3")],
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny()(torch.randn(shape, dtype=torch.float64))


def test_masks_for_other_map_sizes_equal_those_prepared() -> None:
    other = build_model(ModelConfig(style="v1", **{**TINY, "img_size": (16, 16)}), dtype=torch.float64).eval()
    prepared = build_model(ModelConfig(style="v1", **{**TINY, "img_size": (36, 28)}), dtype=torch.float64).eval()
    prepared.load_state_dict(other.state_dict())
    images = torch.randn(1, 3, 36, 28, dtype=torch.float64)
    assert torch.equal(other(images).logits, prepared(images).logits)


def test_state_holds_parameters_alone() -> None:
    model = sparse()
    saved = {name for name, _ in model.named_parameters()}
    assert set(model.state_dict()) == saved
    assert {"index", "offsets", "shifted_mask"} <= {name.rpartition(".")[2] for name, _ in model.named_buffers()}


def test_names_are_microsofts() -> None:
    names = set(tiny("v2", absolute_pos_embed=True).state_dict())
    block = "layers.0.blocks.0"
    assert {
        "absolute_pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.norm.weight",
        f"{block}.attn.q_bias",
        f"{block}.attn.v_bias",
        f"{block}.attn.logit_scale",
        f"{block}.attn.cpb_mlp.0.weight",
        f"{block}.attn.cpb_mlp.2.weight",
        f"{block}.mlp.fc1.weight",
        f"{block}.mlp.fc2.bias",
        "layers.0.downsample.reduction.weight",
        "layers.0.downsample.norm.weight",
        "norm.weight",
        "head.weight",
    } <= names
    assert f"{block}.attn.qkv.bias" not in names
    assert f"{block}.attn.qkv.bias" in tiny("v1").state_dict()
    assert f"{block}.attn.relative_position_bias_table" in tiny("v1").state_dict()


def test_copies_compute_the_same() -> None:
    for model in (tiny(), sparse()):
        expected = model(IMAGES).logits
        assert torch.equal(copy.deepcopy(model)(IMAGES).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(tiny()))(IMAGES).logits, tiny()(IMAGES).logits)


def test_a_meta_model_becomes_real() -> None:
    model = build_model(ModelConfig(style="v2", **TINY), device="meta")
    model = model.to_empty(device="cpu").double().eval()
    model.prepare_tables()
    model.load_state_dict(tiny().state_dict())
    assert torch.equal(model(IMAGES).logits, tiny()(IMAGES).logits)


def test_the_largest_model_has_three_billion_parameters() -> None:
    model = create_model("swin_v2_g_192_w12", device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == 3.00
    norms = [name for name in model.state_dict() if "norm3.weight" in name]
    assert norms == [f"layers.2.blocks.{i}.norm3.weight" for i in range(5, 42, 6)]


def test_create_model_lays_overrides_on_a_preset() -> None:
    model = create_model("swin_moe_micro", num_classes=4, moe={"top_k": 2}, device="meta")
    assert (model.num_classes, model.config.moe.top_k, model.config.moe.num_experts) == (4, 2, 8)
    assert create_model("swin_moe_micro", moe=MoEConfig(num_experts=2), device="meta").config.moe.num_experts == 2
    assert create_model("swin_moe_micro", moe=None, device="meta").moe_layers() == {}
    with pytest.raises(ConfigError, match="did you mean 'swin_micro'"):
        create_model("swin_mico")
    with pytest.raises(ConfigError, match="did you mean 'num_classes'"):
        create_model("swin_micro", num_clases=4)


def test_twins_draw_the_same_stochastic_depth_whatever_else_they_draw() -> None:
    dense, moe = tiny(drop_path_rate=0.5).train(), sparse(drop_path_rate=0.5, drop_rate=0.1).train()
    draws = []
    for model in (dense, moe):
        torch.manual_seed(11)
        draws.append(torch.stack([k for k in model._draw_keeps(IMAGES) if k is not None]))
    assert torch.equal(*draws)
    assert draws[0].shape == (4, 2, 2)
    assert bool((draws[0][0] == 1).all())  # the first block is never dropped
    # and nothing random is drawn before: the draws open the forward pass
    torch.manual_seed(11)
    first = torch.rand(4, 2, 2)
    rates = torch.linspace(0, 0.5, 4).view(-1, 1, 1)
    assert torch.equal(draws[0], ((first >= rates) / (1 - rates)).double())
    assert model.eval()._draw_keeps(IMAGES) == [None] * 4


def test_stochastic_depth_keeps_the_mean_and_drops_whole_branches() -> None:
    model = tiny("v1", depths=(1, 1), drop_path_rate=0.5).train()
    keeps = model._draw_keeps(torch.empty(20000, 0))[1]
    assert keeps is not None
    assert set(keeps.unique().tolist()) == {0.0, 2.0}
    assert float(keeps.mean()) == pytest.approx(1, abs=0.05)
    stage = model.layers[1]
    x = torch.randn(2, 4, 4, 16, dtype=torch.float64)
    y, _ = stage(x, [torch.zeros(2, 2, dtype=torch.float64)])
    assert torch.equal(y, x)


def test_res_post_norm_blocks_begin_as_the_identity() -> None:
    model = tiny("v2", res_post_norm_init=0.0)
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    y, _ = model.layers[0](x, [None, None])
    assert torch.equal(x, y)


@pytest.mark.parametrize("style", ["v1", "v2"])
@torch.no_grad()
def test_res_post_norm_ignores_the_scale_of_what_it_norms(style: str) -> None:
    model = tiny(style)
    outputs = []
    for factor in (1e3, 1e3):  # the first lifts initial outputs far above the norm's epsilon
        for name, parameter in model.named_parameters():
            if "attn.proj" in name or "mlp.fc2" in name:
                parameter *= factor
        outputs.append(model(IMAGES).logits)
    assert torch.allclose(*outputs, rtol=1e-6, atol=1e-6) == (style == "v2")


def gradients(model: SwinTransformer, images: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(5)
    for layer in model.moe_layers().values():
        layer.seed_noise(7)
    out = model(images)
    model.zero_grad()
    (out.logits.square().sum() + out.aux_loss).backward()
    return [out.logits.detach(), out.aux_loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def moe_with_noise() -> MoEConfig:
    return MoEConfig(
        num_experts=4,
        top_k=2,
        router=RouterConfig(noise=1.0),
        losses=BalanceLossConfig(importance_load=0.1, z=0.01),
        experts=ExpertConfig(dropout=0.2),
    )


@pytest.mark.parametrize("kind", ["v1", "v2", "sparse"])
def test_recomputation_changes_no_gradient(kind: str) -> None:
    """With stochastic depth, dropout and gate noise on: what is drawn once is drawn once."""
    over: dict[str, Any] = {"drop_path_rate": 0.5, "drop_rate": 0.2, "attn_drop_rate": 0.2}
    model = sparse(moe=moe_with_noise(), **over) if kind == "sparse" else tiny(kind, **over)
    model.train()
    direct = gradients(model, IMAGES)
    model.set_grad_checkpointing()
    recomputed = gradients(model, IMAGES)
    assert len(direct) == len(recomputed) > 40
    for a, b in zip(direct, recomputed, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_routing_happens_once_under_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    from swinmoe.moe import MoEMlp

    calls = {"assign": 0, "carry": 0}
    for name in calls:
        original = getattr(MoEMlp, name)

        def counted(self, *args, _name=name, _original=original):
            calls[_name] += 1
            return _original(self, *args)

        monkeypatch.setattr(MoEMlp, name, counted)
    model = sparse(grad_checkpointing=True).train()
    out = model(IMAGES)
    (out.logits.sum() + out.aux_loss).backward()
    assert calls == {"assign": 3, "carry": 6}
    assert [int(stats.tokens) for stats in out.routing.values()] == [128, 32, 32]


def test_recomputation_keeps_less() -> None:
    def kept(model: SwinTransformer) -> int:
        sizes: dict[int, int] = {}

        def note(t: torch.Tensor) -> torch.Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = model(IMAGES)
        assert out.logits.requires_grad
        return sum(sizes.values())

    for model in (tiny(depths=(2, 6)), sparse(depths=(2, 6))):
        model.train()
        direct = kept(model)
        model.set_grad_checkpointing()
        assert kept(model) < 0.7 * direct


def exported(model: SwinTransformer, images: torch.Tensor) -> torch.nn.Module:
    """`model` as a program for any number of images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about torch's own
        return torch.export.export(model, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}).module()


@pytest.mark.parametrize("style", ["v1", "v2"])
def test_export_with_a_dynamic_batch(style: str) -> None:
    model = tiny(style, img_size=(18, 14))  # pads and shifts
    program = exported(model, torch.randn(3, 3, 18, 14, dtype=torch.float64))
    for batch in (1, 3, 5):
        images = torch.randn(batch, 3, 18, 14, dtype=torch.float64)
        assert torch.allclose(program(images).logits, model(images).logits, atol=1e-12)


def test_static_layout_exports_with_a_dynamic_batch() -> None:
    """Slots follow the batch in the exported program too; capacity 0.5 drops, so that who is dropped must agree."""
    moe = MoEConfig(
        num_experts=4,
        top_k=2,
        router=RouterConfig(batch_prioritized=True),
        capacity=CapacityConfig(eval=CapacityPolicy(kind="fixed", factor=0.5)),
        dispatcher="padded",
        shared_expert_ratio=0.5,
    )
    model = tiny("v1", moe=moe, moe_blocks=((), (0,)), depths=(1, 1), img_size=(18, 14))
    program = exported(model, torch.randn(3, 3, 18, 14, dtype=torch.float64))
    for batch in (1, 3, 7):
        images = torch.randn(batch, 3, 18, 14, dtype=torch.float64)
        got, expected = program(images), model(images)
        assert torch.allclose(got.logits, expected.logits, atol=1e-12)
        assert torch.allclose(got.aux_loss, expected.aux_loss, atol=1e-12)
        (a,), (b,) = got.routing.values(), expected.routing.values()
        assert torch.equal(a.expert_ids, b.expert_ids) and int(a.tokens) == batch * 20
        assert int(a.kept.sum()) < int(a.routed.sum())


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_compiles_to_one_graph_with_equal_gradients(kind: str) -> None:
    model = tiny(kind, drop_path_rate=0.3).train()
    expected = gradients(model, IMAGES)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(5)
    model.zero_grad()
    out = compiled(IMAGES)
    out.logits.square().sum().backward()
    got = [out.logits.detach(), out.aux_loss, *(p.grad for p in model.parameters() if p.grad is not None)]
    for a, b in zip(expected, got, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def test_set_input_size_keeps_the_function_where_it_can() -> None:
    images = torch.randn(1, 3, 24, 8, dtype=torch.float64)
    for style in ("v1", "v2", "swin_moe"):
        model = tiny(style)
        before = model(images).logits
        model.set_input_size(img_size=(24, 8))
        assert model.img_size == (24, 8)
        assert torch.equal(model(images).logits, before)
        rebuilt = build_model(model.config, dtype=torch.float64).eval()
        rebuilt.load_state_dict(model.state_dict())
        assert torch.equal(rebuilt(images).logits, before)


@pytest.mark.parametrize("style", ["v1", "v2"])
@pytest.mark.parametrize("window", [2, 8, (3, 5)])
def test_set_input_size_to_another_window(style: str, window: Any) -> None:
    model = tiny(style, absolute_pos_embed=True)
    model.set_input_size(img_size=32, window_size=window)
    rebuilt = build_model(model.config, dtype=torch.float64).eval()
    rebuilt.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(rebuilt(images).logits, model(images).logits)


def test_log_spaced_offsets_stay_what_they_were_when_the_window_grows() -> None:
    model = tiny("v2")
    small = model.layers[0].offsets.view(7, 7, 2)
    model.set_input_size(img_size=32, window_size=8)
    assert torch.allclose(model.layers[0].offsets.view(15, 15, 2)[4:-4, 4:-4], small, atol=1e-15)


def test_reset_classifier() -> None:
    model = tiny()
    model.reset_classifier(5)
    assert model.num_classes == 5 and model(IMAGES).logits.shape == (2, 5)
    assert torch.equal(model.head.weight, tiny(num_classes=5).head.weight)
    model.reset_classifier(0)
    out = model(IMAGES)
    assert torch.equal(out.logits, out.features)
    with pytest.raises(ConfigError, match="global_pool='max'"):
        model.reset_classifier(5, global_pool="max")


def test_weight_decay_spares_positions_scales_and_expert_biases() -> None:
    spared = sparse(
        absolute_pos_embed=True, moe=MoEConfig(num_experts=4, router=RouterConfig(type="cosine"))
    ).no_weight_decay()
    kinds = {name.split("attn.")[-1].split("mlp.", 1)[-1] if "layers" in name else name for name in spared}
    assert {"absolute_pos_embed", "logit_scale", "0.weight", "2.weight"} <= kinds
    assert {"router.sim_matrix", "router.temperature", "router.projector.weight", "experts.fc1_bias"} <= kinds
    plain = sparse(style="v1").no_weight_decay()
    assert any(name.endswith("relative_position_bias_table") for name in plain)
    assert not any("router.weight" in name or name.endswith(("fc1_weight", "qkv.weight")) for name in plain)


def test_layer_groups_follow_depth() -> None:
    from timm.models import group_parameters

    model = tiny(depths=(2, 1))
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    order = [groups[name] for name in ("patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight")]
    order += [groups[f"layers.{name}.weight"] for name in ("0.blocks.1.norm1", "1.blocks.0.norm1")]
    assert order == [0, 1, 2, 3]
    assert groups["layers.0.downsample.reduction.weight"] == 2  # merging goes with the block before it
    assert groups["head.weight"] == 4
    assert set(groups) == {name for name, _ in model.named_parameters()}
