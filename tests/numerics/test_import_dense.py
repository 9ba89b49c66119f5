"""Dense models of Microsoft, Hugging Face, timm and torchvision give their own logits after import, and return equal.

Microsoft's and Hugging Face's logits are recorded (`tests/data/record_dense.py`); timm and torchvision run here.
"""

from __future__ import annotations

import pytest
import torch
from import_weights import DERIVED, draw, images, recorded
from torch import Tensor, nn

from swinmoe.checkpoint.convert import model_of
from swinmoe.checkpoint.export import export_state
from swinmoe.checkpoint.source import Source, read_source
from swinmoe.errors import CheckpointError
from swinmoe.models import SwinTransformer
from swinmoe.train.pretrained import Pretrained, complete_model

MICROSOFT, MICROSOFT_FACTS = recorded("swin_microsoft.safetensors")
HUGGINGFACE, HUGGINGFACE_FACTS = recorded("swin_huggingface.safetensors")


def parameters(facts: dict, case: str) -> dict[str, Tensor]:
    return {name: draw(name, tuple(shape), facts[case]["seed"]) for name, shape in facts[case]["shapes"].items()}


def stored(vectors: dict[str, Tensor], case: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{case}/"): tensor
        for name, tensor in vectors.items()
        if name.startswith(f"{case}/") and name.endswith(DERIVED)
    }


def ours(source: Source, allow: tuple[str, ...] = (), **over) -> SwinTransformer:
    """The model that the weights alone lead to, with them, as `swinmoe convert` makes it."""
    return model_of(source, overrides=over, allow=allow)[0].eval()


@torch.no_grad()
def logits_of(model: SwinTransformer, facts: dict, case: str) -> Tensor:
    config = facts[case]["config"]
    side = config.get("img_size", config.get("image_size"))
    assert model.config.img_size == (side, side)
    assert model.config.window_size == (config["window_size"],) * 2
    return model(images(2, side, facts[case]["seed"])).logits


@pytest.mark.parametrize("case", ["v1", "v1_shrunk", "v2", "v2_4to8"])
def test_microsoft(case: str) -> None:
    weights = parameters(MICROSOFT_FACTS, case)
    model = ours(read_source({**weights, **stored(MICROSOFT, case)}))
    assert model.config.pretrained_window_sizes == ((4, 4) if case == "v2_4to8" else None)
    gap = logits_of(model, MICROSOFT_FACTS, case) - MICROSOFT[f"{case}/logits"]
    assert float(gap.abs().max()) <= 1e-5
    assert_equal(export_state(model, "microsoft"), weights)


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("case", ["simmim_v1", "simmim_v2"])
def test_simmim(case: str, renamed: bool) -> None:
    """The encoder, once its decoder and mask token are allowed to go; with the position MLP's older name too."""
    state = {**parameters(MICROSOFT_FACTS, case), **stored(MICROSOFT, case)}
    if renamed:
        state = {name.replace("cpb_mlp", "rpe_mlp"): tensor for name, tensor in state.items()}
    source = read_source(state)
    with pytest.raises(CheckpointError, match=r"decoder\.0\.weight"):
        ours(source)
    model = ours(source, allow=("mask_token", "decoder.*"))
    gap = logits_of(model, MICROSOFT_FACTS, case) - MICROSOFT[f"{case}/logits"]
    assert float(gap.abs().max()) <= 1e-5


@pytest.mark.parametrize("case", sorted(HUGGINGFACE_FACTS))
def test_huggingface(case: str) -> None:
    weights = parameters(HUGGINGFACE_FACTS, case)
    config = HUGGINGFACE_FACTS[case]["config"]
    over = {"img_size": config["image_size"]}
    if case.startswith("v2"):  # keeps no tables in its files: they do not tell the window
        with pytest.raises(CheckpointError, match="does not tell its window"):
            ours(read_source(weights))
        over |= {"window_size": config["window_size"]}
        over |= {"pretrained_window_sizes": config.get("pretrained_window_sizes")}
    model = ours(read_source(weights), **over)
    gap = logits_of(model, HUGGINGFACE_FACTS, case) - HUGGINGFACE[f"{case}/logits"]
    assert float(gap.abs().max()) <= 1e-5
    if not case.endswith("bare"):
        assert_equal(export_state(model, "huggingface"), weights)


def test_masks_are_those_of_the_source_whatever_is_said_besides() -> None:
    """On top of a preset too; and what is said counts more. Hugging Face's V2 adds its mask of -100 twice."""
    weights = parameters(MICROSOFT_FACTS, "v2")
    state = {**weights, **stored(MICROSOFT, "v2")}
    size = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in MICROSOFT_FACTS["v2"]["config"].items()
        if key in ("img_size", "window_size", "embed_dim", "depths", "num_heads", "num_classes", "in_chans")
    }
    for said, value in (({}, -100.0), ({"mask_value": None}, None), ({"mask_value": -9.0}, -9.0)):
        model, _ = model_of(read_source(state), preset="swin_v2_t_256_w8", overrides={**size, **said})
        assert model.config.mask_value == value
        tuned = complete_model(
            {"preset": "swin_v2_t_256_w8", **said}, Pretrained("x", read_source(state), "model", None)
        )
        assert tuned["mask_value"] == value
    for case in sorted(HUGGINGFACE_FACTS):
        config = HUGGINGFACE_FACTS[case]["config"]
        over = {"img_size": config["image_size"], "window_size": config["window_size"]}
        assert ours(read_source(parameters(HUGGINGFACE_FACTS, case)), **over).config.mask_value == (
            -200 if case.startswith("v2") else -100
        )


def test_huggingface_in_memory() -> None:
    """transformers 5 has other names for V1 in memory than in files."""
    weights = parameters(HUGGINGFACE_FACTS, "v1")
    renamed = {}
    for name, tensor in weights.items():
        for old, new in (
            ("attention.self.query", "attention.q_proj"),
            ("attention.self.key", "attention.k_proj"),
            ("attention.self.value", "attention.v_proj"),
            ("attention.self.relative", "attention.relative_position_bias.relative"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ):
            name = name.replace(old, new)
        renamed[name] = tensor
    assert_equal(ours(read_source(renamed)).state_dict(), ours(read_source(weights)).state_dict())


def live(library: str, version: str) -> nn.Module:
    """A small model of timm or torchvision with weights drawn by name."""
    size = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 7}
    if library == "timm":
        from timm.models.swin_transformer import SwinTransformer as V1
        from timm.models.swin_transformer_v2 import SwinTransformerV2 as V2

        model = (V1 if version == "v1" else V2)(img_size=64, window_size=4, **size)
    else:
        from torchvision.models import swin_transformer as tv

        kinds = {
            "v1": {"block": tv.SwinTransformerBlock, "downsample_layer": tv.PatchMerging},
            "v2": {"block": tv.SwinTransformerBlockV2, "downsample_layer": tv.PatchMergingV2},
        }
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in size.items()}
        model = tv.SwinTransformer(patch_size=[4, 4], window_size=[4, 4], **lists, **kinds[version])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw(name, tuple(parameter.shape), 5))
            if name.endswith("logit_scale"):
                parameter.fill_(5.0)  # above ln 100: logits come near what masks add, and only the same mask will do
            if library == "torchvision" and version == "v2" and name.endswith("qkv.bias"):
                dim = len(parameter) // 3
                parameter[dim : 2 * dim] = 0  # as it is after the first forward
    return model.eval()


@pytest.mark.parametrize("side", [64, 56])
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
@torch.no_grad()
def test_timm_and_torchvision(library: str, version: str, side: int) -> None:
    """At 56 pixels maps of 14 and 7 do not divide into windows of 4; timm is not asked, since it pads after rolling."""
    if library == "timm" and side == 56:
        pytest.skip("timm #2438")
    theirs = live(library, version)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    over = {"window_size": 4, "img_size": 64} if library == "timm" and version == "v2" else {}
    model = ours(read_source(state), **over)
    assert model.config.mask_value == -100
    x = images(2, side, 9)
    assert float((model(x).logits - theirs(x)).abs().max()) <= 1e-5
    back = export_state(model, library)
    assert_equal(back, dict(theirs.named_parameters()))
    result = live(library, version).load_state_dict(back, strict=False)
    assert not result.unexpected_keys
    assert all(name.endswith(DERIVED) for name in result.missing_keys)


def test_timm_before_its_rename() -> None:
    """Mergings close their stage and the head is `head`: Microsoft's names."""
    state = {}
    for name, tensor in live("timm", "v1").state_dict().items():
        parts = name.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        state[".".join(part for part in parts if part != "fc")] = tensor
    theirs, x = live("timm", "v1"), images(2, 64, 9)
    with torch.no_grad():
        assert float((ours(read_source(state))(x).logits - theirs(x)).abs().max()) <= 1e-5


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert set(a) == set(b)
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())


class UnfoldMerging(nn.Module):
    """Patch merging as OpenMMLab does it: neighbours come out of `nn.Unfold` channel by channel."""

    def __init__(self, norm: nn.LayerNorm, reduction: nn.Linear) -> None:
        super().__init__()
        self.sampler = nn.Unfold(kernel_size=2, stride=2)
        self.norm, self.reduction = norm, reduction

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        rows = self.sampler(x.permute(0, 3, 1, 2)).transpose(1, 2)
        return self.reduction(self.norm(rows)).view(batch, height // 2, width // 2, -1)


@torch.no_grad()
def test_mmdet_merges_by_function() -> None:
    """Its merging's weights, which have the shape of ours and another order, compute the same after import."""
    weights = parameters(MICROSOFT_FACTS, "v1")
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("head."):
            continue
        for old, new in (
            ("layers.", "stages."),
            (".attn.", ".attn.w_msa."),
            ("mlp.fc1", "ffn.layers.0.0"),
            ("mlp.fc2", "ffn.layers.1"),
            ("patch_embed.proj", "patch_embed.projection"),
        ):
            name = name.replace(old, new)
        renamed[f"backbone.{'norm1' + name[4:] if name.startswith('norm.') else name}"] = tensor
    model = ours(read_source({**renamed, "bbox_head.weight": torch.zeros(2)}), allow=("bbox_head.*",))
    merging, prefix = model.layers[0].downsample, "backbone.stages.0.downsample"
    norm, reduction = nn.LayerNorm(64), nn.Linear(64, 32, bias=False)
    norm.load_state_dict({kind: renamed[f"{prefix}.norm.{kind}"] for kind in ("weight", "bias")})
    reduction.load_state_dict({"weight": renamed[f"{prefix}.reduction.weight"]})
    x = torch.randn(2, 6, 4, 16)
    assert torch.allclose(merging(x), UnfoldMerging(norm, reduction)(x), atol=1e-6)
    unchanged = ours(read_source(weights), num_classes=7).layers[0].downsample
    assert not torch.allclose(unchanged(x), merging(x), atol=1e-2)  # what a plain renaming would have given
    assert torch.equal(model.norm.weight, weights["norm.weight"])
