"""Types, windows, disks and averages in loading weights and writing them: as they are in the source, or told."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from swinmoe.checkpoint.convert import model_of
from swinmoe.checkpoint.export import write_export
from swinmoe.checkpoint.load import load_pretrained
from swinmoe.checkpoint.pretrained import save_pretrained
from swinmoe.checkpoint.source import read_source
from swinmoe.checkpoint.upcycle import upcycle
from swinmoe.config import ModelConfig, MoEConfig
from swinmoe.errors import CheckpointError
from swinmoe.models import SwinTransformer, build_model

SMALL = {"img_size": (32, 32), "window_size": (4, 4), "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 4)}


def small(seed: int = 0, dtype: torch.dtype | None = None, **over) -> SwinTransformer:
    return build_model(ModelConfig(**{**SMALL, "num_classes": 5, **over}), seed=seed, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_keeps_the_type_and_loading_tells_of_a_cast(dtype: torch.dtype) -> None:
    state = small(1, dtype).state_dict()
    model, report = model_of(read_source(state), overrides={"img_size": 32})
    assert all(
        torch.equal(tensor, state[name]) and tensor.dtype == dtype for name, tensor in model.state_dict().items()
    )
    assert not report.resized
    told = load_pretrained(small(2), state).resized
    assert set(told) == set(state)
    assert set(told.values()) == {f"{dtype} -> float32".removeprefix("torch.")}
    sparse = small(3, moe=MoEConfig(num_experts=2, top_k=2), moe_blocks=((), (0,)))
    told = upcycle(small(1, dtype), sparse).resized
    assert told["layers.1.blocks.0.mlp.experts.1.fc1.weight"] == told["norm.bias"]
    assert torch.equal(sparse.head.weight, state["head.weight"].float())


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_what_is_no_real_number_is_no_weight(dtype: torch.dtype) -> None:
    state = {**small(1).state_dict(), "head.bias": torch.zeros(5, dtype=dtype)}
    model = small(2)
    with pytest.raises(
        CheckpointError, match=r"head\.bias is (int64|complex64) in the source and float32 in the model"
    ):
        load_pretrained(model, state)
    sparse = small(3, moe=MoEConfig(num_experts=2, top_k=2), moe_blocks=((), (0,)))
    with pytest.raises(CheckpointError, match=r"'head\.bias' is torch\.(int64|complex64)"):
        upcycle(state, sparse)


def test_windows_of_equal_tables_are_told_apart(tmp_path: Path) -> None:
    """4 x 8 and 8 x 4 have as many offsets, and maps of 8 x 16 and 16 x 8 as many places."""
    wide = {"img_size": (32, 64), "window_size": (4, 8), "absolute_pos_embed": True}
    tall = {"img_size": (64, 32), "window_size": (8, 4), "absolute_pos_embed": True}
    source, model = small(1, **wide), small(2, **tall)
    save_pretrained(source, tmp_path / "wide")
    report = load_pretrained(model, tmp_path / "wide")
    assert report.resized["absolute_pos_embed"] == "positions 8x16 -> 16x8, bicubic"
    assert report.resized["layers.0.blocks.0.attn.relative_position_bias_table"].startswith(
        "bias table of window 4x8 -> 8x4"
    )
    source.set_input_size((64, 32), (8, 4))
    images = torch.randn(2, 3, 64, 32)
    assert torch.allclose(model(images).logits, source(images).logits, atol=1e-5)
    larger = small(2, **{**wide, "img_size": (64, 128)})
    assert load_pretrained(larger, tmp_path / "wide").resized == {
        "absolute_pos_embed": "positions 8x16 -> 16x32, bicubic"
    }


@pytest.mark.parametrize("to", ["timm", "microsoft", "huggingface"])
def test_a_full_disk_leaves_nothing_and_names_the_file(to: str, tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not write '.*/model\.(pth|safetensors)': .*free space"):
            write_export(small(1), tmp_path / "out", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not (tmp_path / "out").exists()
    write_export(small(1), tmp_path / "out", to)
    assert not list((tmp_path / "out").glob(".writing-*"))
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / "out").iterdir())


def test_an_average_must_be_there_to_be_taken(tmp_path: Path) -> None:
    save_pretrained(small(1), tmp_path / "model")
    assert read_source(tmp_path / "model").weights == "model"
    with pytest.raises(CheckpointError, match="holds no moving average"):
        read_source(tmp_path / "model", which="average")
    with pytest.raises(CheckpointError, match="holds no moving average"):
        read_source(small(1).state_dict(), which="average")


def test_an_undecided_router_is_something_in_float16_too() -> None:
    sparse = small(3, moe=MoEConfig(num_experts=4), moe_blocks=((), (0,)))
    dense = small(1)
    upcycle(dense, sparse)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(sparse(images).logits, dense(images).logits, atol=5e-6)
    router = sparse.moe_layers()["layers.1.blocks.0.mlp"].router
    assert router.half().weight.ne(0).any(1).all()  # every expert has a score of its own
