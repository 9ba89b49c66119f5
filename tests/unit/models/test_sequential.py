"""Sequential self-attention: the same function and gradients as all windows at once, and less kept for the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from swinmoe.config import ModelConfig
from swinmoe.errors import ConfigError
from swinmoe.models import SwinTransformer, build_model
from swinmoe.models.attention import WindowAttention
from swinmoe.models.sequential import _parts

IMAGES = torch.randn(3, 3, 36, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def model_of(style: str, **over: Any) -> SwinTransformer:
    """Two stages of windows that are padded, shifted and masked, every weight moved."""
    cfg = ModelConfig(
        **{
            "style": style,
            "img_size": (36, 28),
            "patch_size": (2, 2),
            "window_size": (4, 4),
            "num_classes": 5,
            "embed_dim": 8,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "drop_path_rate": 0.0,
            **over,
        }
    )
    model = build_model(cfg, dtype=torch.float64)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.2 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(len(name))))
    return model.train()


def outcome(model: SwinTransformer) -> list[torch.Tensor]:
    """Logits and every gradient, the images' too."""
    torch.manual_seed(3)
    images = IMAGES.clone().requires_grad_()
    logits = model(images).logits
    found = torch.autograd.grad(logits.square().sum(), [images, *model.parameters()])
    return [logits.detach(), *found]


@pytest.mark.parametrize("impl", ["auto", "explicit", "sdpa"])
@pytest.mark.parametrize("style", ["v1", "v2", "swin_moe"])
@pytest.mark.parametrize("chunks", [2, 5, 100])
def test_is_attention_at_once(style: str, impl: Any, chunks: int) -> None:
    """Chunks of rows of windows, of unequal ones, and of single rows of single images."""
    model = model_of(style)
    model.set_attention_impl(impl)
    expected = outcome(model)
    model.set_attention_chunks(chunks)
    for a, b in zip(expected, outcome(model), strict=True):
        assert float((a - b).abs().max()) <= 1e-12 * max(1.0, float(a.abs().max()))


@pytest.mark.parametrize("over", [{"attn_drop_rate": 0.3, "drop_rate": 0.1}, {"mask_value": -100.0}], ids=str)
def test_draws_and_masks_are_repeated(over: dict[str, Any]) -> None:
    """What is dropped in the forward pass is dropped in its repetition: central differences are the witness."""
    model = model_of("v2", **over)
    model.set_attention_chunks(4)
    direction = torch.randn(IMAGES.shape, dtype=IMAGES.dtype, generator=torch.Generator().manual_seed(1))

    def loss(step: float) -> torch.Tensor:
        torch.manual_seed(3)
        images = (IMAGES + step * direction).requires_grad_()
        value: torch.Tensor = model(images).logits.square().sum()
        if step == 0:
            (slope,) = torch.autograd.grad(value, images)
            return (slope * direction).sum()
        return value.detach()

    epsilon = 1e-5
    numeric = (loss(epsilon) - loss(-epsilon)) / (2 * epsilon)
    assert torch.isclose(loss(0.0), numeric, rtol=1e-6)


def test_it_nests_in_recomputed_blocks() -> None:
    model = model_of("v2")
    expected = outcome(model)
    model.set_attention_chunks((3, 1))
    model.set_grad_checkpointing([0])
    for a, b in zip(expected, outcome(model), strict=True):
        assert float((a - b).abs().max()) <= 1e-12 * max(1.0, float(a.abs().max()))


def kept_bytes(model: SwinTransformer, around: Callable[[], Any] = torch.enable_grad) -> int:
    """Bytes of storages, parameters apart, that a forward pass keeps for its backward pass."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    held = []

    def note(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(t)  # so that no address is used twice
        return t

    with around(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = model(IMAGES)
    assert output.logits.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("impl", ["auto", "explicit"])
def test_no_scores_are_kept(impl: Any) -> None:
    """Windows of 64 tokens and heads of 4: scores are 16 times a query map, and the most of what a layer keeps."""
    model = model_of("v1", img_size=(32, 32), window_size=(8, 8))
    model.set_attention_impl(impl)
    at_once = kept_bytes(model)
    model.set_attention_chunks(4)
    assert kept_bytes(model) < 0.6 * at_once
    model.set_attention_chunks((4, 1))
    in_one_stage = kept_bytes(model)
    model.set_attention_chunks((1, 1))
    assert in_one_stage < kept_bytes(model) == at_once


def test_nothing_is_recomputed_where_no_backward_pass_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = WindowAttention._attend_windows

    def counted(self: WindowAttention, *args: Any) -> torch.Tensor:
        calls.append(1)
        return original(self, *args)

    monkeypatch.setattr(WindowAttention, "_attend_windows", counted)
    model = model_of("v1", attention_chunks=2)
    with torch.no_grad():
        expected = model(IMAGES).logits
    assert len(calls) == 8  # 4 blocks, 2 chunks
    logits = model(IMAGES).logits
    logits.sum().backward()
    assert len(calls) == 8 + 16
    assert torch.equal(logits, expected)


def test_an_empty_batch_passes() -> None:
    model = model_of("v2", attention_chunks=3)
    assert model(IMAGES[:0]).logits.shape == (0, 5)


@pytest.mark.parametrize(("images", "rows", "chunks"), [(1, 7, 3), (4, 2, 2), (4, 2, 7), (2, 3, 100), (5, 1, 4)])
def test_parts_cover_everything_once(images: int, rows: int, chunks: int) -> None:
    seen = torch.zeros(images, rows, dtype=torch.int64)
    parts = list(_parts(images, rows, chunks))
    for some, few in parts:
        seen[some, few] += 1
    assert (seen == 1).all()
    assert min(chunks, rows) <= len(parts) <= images * rows


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_recomputation_stage_by_stage(kind: str) -> None:
    """A stage that recomputes keeps less, the other as much as before; gradients are the same."""
    model = model_of(kind, depths=(3, 3))
    expected, everything = outcome(model), kept_bytes(model)
    kept = {}
    for stages in ([0], [1], [0, 1]):
        model.set_grad_checkpointing(stages)
        assert [stage.grad_checkpointing for stage in model._stages()] == [0 in stages, 1 in stages]
        kept[tuple(stages)] = kept_bytes(model)
        for a, b in zip(expected, outcome(model), strict=True):
            assert float((a - b).abs().max()) <= 1e-12 * max(1.0, float(a.abs().max()))
    assert kept[0, 1] < kept[0,] < kept[1,] < everything  # the first stage has four times the tokens
    saved = [everything - kept[0,], everything - kept[1,]]
    assert everything - kept[0, 1] == sum(saved)
    model.set_grad_checkpointing()
    assert kept_bytes(model) == kept[0, 1]
    model.set_grad_checkpointing(False)
    assert kept_bytes(model) == everything


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"grad_checkpointing": (0, 2)}, r"grad_checkpointing=\[0, 2\] names a stage that is not there; .* \[0, 1\]"),
        ({"grad_checkpointing": (-1,)}, r"grad_checkpointing=\[-1\] names a stage"),
        ({"attention_chunks": 0}, "attention_chunks=0 must be at least 1; use 1 for all windows"),
        ({"attention_chunks": (2, 0)}, "attention_chunks=.* must be at least 1"),
        ({"attention_chunks": (2, 2, 2)}, "attention_chunks=.* names 3 stages, depths 2; give one number for all"),
    ],
)
def test_what_cannot_be(over: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of("v1", **over)
