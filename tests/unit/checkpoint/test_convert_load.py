"""Loading into a model that differs from the source, and what the report says."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from swinmoe.checkpoint.load import load_pretrained
from swinmoe.config import ModelConfig, MoEConfig
from swinmoe.errors import CheckpointError
from swinmoe.models import SwinTransformer, build_model
from swinmoe.moe import MoEMlp

SMALL = {"img_size": (32, 32), "window_size": (4, 4), "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}


def small(seed: int = 0, **over) -> SwinTransformer:
    return build_model(ModelConfig(**{**SMALL, "num_classes": 5, **over}), seed=seed).eval()


def snapshot(model: SwinTransformer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: SwinTransformer, before: Mapping[str, Tensor]) -> None:
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_loads_and_reports_every_tensor_once() -> None:
    source, model = small(1), small(2)
    state = {**source.state_dict(), "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16)}
    report = load_pretrained(model, state)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images).logits, source(images).logits)
    assert set(report.loaded) == set(source.state_dict())
    assert report.unused == ("layers.0.blocks.0.attn.relative_position_index",)  # follows from the configuration
    assert not (report.missing or report.resized or report.reinitialised)


@torch.no_grad()
def test_prefixes_and_several_files(tmp_path) -> None:
    source, model = small(1), small(2)
    state = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    names = sorted(state)
    torch.save({name: state[name].clone() for name in names[:9]}, tmp_path / "a.pth")
    torch.save({"state_dict": {name: state[name].clone() for name in names[9:]}}, tmp_path / "b.pth")
    load_pretrained(model, [tmp_path / "a.pth", tmp_path / "b.pth"])
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"is in both 'a\.pth' and 'c\.pth'"):
        torch.save({names[0]: state[names[0]].clone()}, tmp_path / "c.pth")
        load_pretrained(model, [tmp_path / f"{name}.pth" for name in "abc"])
    with pytest.raises(CheckpointError, match="some have the same name"):
        load_pretrained(model, [tmp_path / "a.pth", tmp_path / "x" / "a.pth"])


def test_what_tutels_gather_writes_is_read() -> None:
    """Of a layer in the old form it writes the number of experts as a plain number."""
    layer = MoEMlp(MoEConfig(num_experts=2), dim=4, hidden_dim=4)
    state = {
        "moe.gates.0.wg.weight": torch.randn(2, 4),
        "moe._num_global_experts": 2,
        **{f"moe.experts.batched_{part}_w": torch.randn(2, 4, 4) for part in ("fc1", "fc2")},
        **{f"moe.experts.batched_{part}_bias": torch.randn(2, 4) for part in ("fc1", "fc2")},
    }
    model = torch.nn.ModuleDict({"moe": layer})
    assert load_pretrained(model, state).unused == ("moe._num_global_experts",)
    assert torch.equal(layer.experts.fc2_weight, state["moe.experts.batched_fc2_w"].transpose(1, 2))


def test_refuses_what_is_missing_or_has_no_place_and_leaves_the_model_alone() -> None:
    source, model = small(1), small(2)
    before = snapshot(model)
    state = dict(source.state_dict())
    del state["layers.1.blocks.0.mlp.fc1.weight"]
    state["decoder.0.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"lacks layers\.1\.blocks\.0\.mlp\.fc1\.weight.*decoder\.0\.weight"):
        load_pretrained(model, state)
    with pytest.raises(CheckpointError, match=r"layers\.1\.blocks\.0\.mlp\.fc1\.weight"):
        load_pretrained(model, state, allow=["decoder.*"])
    assert_untouched(model, before)
    report = load_pretrained(model, state, allow=["decoder.*", "layers.1.blocks.0.mlp.fc1.weight"])
    assert report.missing == ("layers.1.blocks.0.mlp.fc1.weight",)
    assert report.unused == ("decoder.0.weight",)
    assert torch.equal(model.state_dict()[report.missing[0]], before[report.missing[0]])


def test_another_head_must_be_allowed_or_mapped() -> None:
    source, model = small(1), small(2, num_classes=3)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"head\.weight is \(5, 16\) in the source and \(3, 16\) in the model"):
        load_pretrained(model, source.state_dict())
    assert_untouched(model, before)
    report = load_pretrained(model, source.state_dict(), allow=["head.*"])
    assert set(report.reinitialised) == {"head.weight", "head.bias"}
    assert torch.equal(model.head.weight, before["head.weight"])
    report = load_pretrained(model, source.state_dict(), class_map=[4, 0, 4])
    assert torch.equal(model.head.weight, source.head.weight[[4, 0, 4]])
    assert torch.equal(model.head.bias, source.head.bias[[4, 0, 4]])
    assert "5 classes -> 3" in report.resized["head.weight"]


@pytest.mark.parametrize("given", [[0.5, 1, 2, 3, 4], ["a", "b", "c", "d", "e"], [True, 1, 2, 3, 4]])
def test_a_class_map_is_of_whole_numbers(given: list) -> None:
    with pytest.raises(CheckpointError, match=rf"the class map holds {given[0]!r}; give whole numbers"):
        load_pretrained(small(), small(1).state_dict(), class_map=given)


def test_class_map_file_is_checked(tmp_path) -> None:
    source, model = small(1), small(2, num_classes=3)
    path = tmp_path / "map.txt"
    path.write_text("1\n2\n3\n")
    load_pretrained(model, source.state_dict(), class_map=path)
    assert torch.equal(model.head.weight, source.head.weight[[1, 2, 3]])
    for text, message in (
        ("1\n2\n", "has 2 indices"),
        ("1\n2\n5\n", "below the source's 5"),
        ("a\n", "one index a line"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(model, source.state_dict(), class_map=path)


def test_one_channel_from_three_sees_grey_images_as_before() -> None:
    source, grey, six = small(1), small(2, in_chans=1), small(2, in_chans=6)
    image = torch.randn(2, 1, 32, 32)
    expected = source(image.expand(-1, 3, -1, -1)).logits
    assert "3 channels summed to 1" in load_pretrained(grey, source.state_dict()).resized["patch_embed.proj.weight"]
    assert torch.allclose(grey(image).logits, expected, atol=1e-5)
    load_pretrained(six, source.state_dict())
    colour = torch.randn(2, 3, 32, 32)
    assert torch.allclose(six(colour.repeat(1, 2, 1, 1)).logits, source(colour).logits, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"patch_embed\.proj\.weight"):
        load_pretrained(small(2, in_chans=2), source.state_dict())


def test_tables_and_positions_are_resized_as_set_input_size_does() -> None:
    """The source, taken to the new size in memory, is the oracle."""
    source = small(1, absolute_pos_embed=True)
    state = snapshot(source)
    model = small(2, absolute_pos_embed=True, img_size=(64, 64), window_size=(8, 8))
    report = load_pretrained(model, state)
    source.set_input_size(64, 8)
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(model(images).logits, source(images).logits, atol=1e-5)
    assert report.resized["absolute_pos_embed"] == "positions 8x8 -> 16x16, bicubic"
    table = "layers.0.blocks.1.attn.relative_position_bias_table"
    assert report.resized[table] == "bias table of window 4x4 -> 8x8, bicubic"
    shrunk = small(2, absolute_pos_embed=True, img_size=(32, 32), window_size=(2, 2))
    assert "centre" in load_pretrained(shrunk, state).resized[table]
    assert torch.equal(shrunk.state_dict()[table], state[table].view(7, 7, 2)[2:5, 2:5].reshape(9, 2))


@pytest.mark.parametrize("style", ["v2", "swin_moe"])
def test_log_spaced_offsets_keep_their_reference(style: str) -> None:
    source = small(1, style=style)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    stored = {
        f"layers.{stage}.blocks.{block}.attn.relative_coords_table": source.layers[stage].offsets.view(1, 7, 7, 2)
        for stage in (0, 1)
        for block in (0, 1)
    }
    state = {**snapshot(source), **stored}
    model = small(2, style=style, img_size=(64, 64), window_size=(8, 8))
    report = load_pretrained(model, state)
    assert model.config.pretrained_window_sizes == (4, 4)
    assert "layers.1.offsets" in report.resized
    source.set_input_size(64, 8)
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(model(images).logits, source(images).logits, atol=1e-5)
    right = small(2, style=style, img_size=(64, 64), window_size=(8, 8), pretrained_window_sizes=(4, 4))
    assert not load_pretrained(right, state).resized
    wrong = small(2, style=style, img_size=(64, 64), window_size=(8, 8), pretrained_window_sizes=(8, 4))
    with pytest.raises(CheckpointError, match=r"normalised by windows \[4, 4\].*says \[8, 4\]"):
        load_pretrained(wrong, state)
    load_pretrained(wrong, state, allow=["pretrained_window_sizes"])
    assert wrong.config.pretrained_window_sizes == (8, 4)


def test_names_of_no_known_layout_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no layout known here.*conv1"):
        load_pretrained(small(), {"conv1.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="Swin V2 is not known"):
        load_pretrained(
            small(),
            {
                "stages.0.blocks.0.attn.w_msa.qkv.weight": torch.zeros(2),
                "stages.0.blocks.0.attn.w_msa.logit_scale": torch.zeros(2),
            },
        )
