"""Properties of window attention that the papers claim, and that its two implementations agree."""

from __future__ import annotations

import itertools

import pytest
import torch

from swinmoe.config import StyleConfig
from swinmoe.models.attention import WindowAttention, WindowTables
from swinmoe.models.position import log_offsets, relative_index
from swinmoe.models.windows import attention_mask, window_grid

STYLES = [
    StyleConfig(similarity=similarity, position_bias=bias)
    for similarity, bias in itertools.product(("dot", "cosine"), ("table", "log-cpb-sigmoid"))
]


def make(style: StyleConfig, size=(10, 7), window=(4, 4), shifted=True, **options) -> tuple:
    attn = WindowAttention(16, 2, window, style, **options).double()
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    grid = window_grid(size, window, shifted=shifted, square=True, small_map="shrink")
    offsets = None if style.position_bias == "table" else log_offsets(window, window, torch.float64)
    tables = WindowTables(grid, relative_index(window, window), offsets, attention_mask(grid, "mask"))
    return attn, tables, torch.randn(2, *size, 16, dtype=torch.float64)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_fused_and_explicit_attention_agree_with_all_gradients(style: StyleConfig, shifted: bool) -> None:
    attn, tables, x = make(style, shifted=shifted)
    results = []
    for impl in ("explicit", "sdpa"):
        attn.attention_impl = impl
        leaf = x.clone().requires_grad_()
        y = attn(leaf, tables)
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *attn.parameters()])))
    for explicit, fused in zip(*results, strict=True):
        assert torch.allclose(explicit, fused, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_cosine_attention_ignores_the_length_of_queries_and_keys(similarity: str) -> None:
    attn, tables, x = make(StyleConfig(similarity=similarity), qkv_bias=False)
    before = attn(x, tables)
    with torch.no_grad():
        attn.qkv.weight[:32] *= 30
    change = (attn(x, tables) - before).abs().max()
    assert (change < 1e-12) == (similarity == "cosine")


def test_logit_scale_is_held_at_one_hundred() -> None:
    attn, tables, x = make(STYLES[2])
    outputs = []
    for value in (4.7, 9.0):
        torch.nn.init.constant_(attn.logit_scale, value)
        outputs.append(attn(x, tables))
    assert torch.equal(*outputs)


def test_minus_one_hundred_is_no_mask_for_cosine_attention_and_the_boolean_mask_is() -> None:
    """All queries equal the keys across the seam and oppose those of their own side, at the highest scale: the logits
    differ by 200, so that -100 lets all attention go where it is forbidden."""
    size = (1, 8)
    for mask_value, leaks in ((-100.0, True), (None, False)):
        attn = WindowAttention(2, 1, (4, 4), StyleConfig(similarity="cosine"), mask_value=mask_value).double()
        with torch.no_grad():
            for parameter in attn.parameters():
                parameter.zero_()
            attn.logit_scale.fill_(9.0)
            attn.q_bias.copy_(torch.tensor([1.0, 0.0]))
            attn.qkv.weight[2:4] = torch.eye(2)
            attn.qkv.weight[4:6] = torch.eye(2)
            attn.proj.weight.copy_(torch.eye(2))
        grid = window_grid(size, (1, 4), shifted=True, square=False, small_map="shrink")
        tables = WindowTables(grid, relative_index((1, 4), (4, 4)), None, attention_mask(grid, "mask"))
        x = torch.zeros(1, *size, 2, dtype=torch.float64)
        x[..., 0] = -1.0
        x[:, :, :2, 0] = 1.0  # tokens 0 and 1 sit in the last shifted window, beside tokens 6 and 7
        own_side = attn(x, tables)[0, 0, 6:, 0]
        assert bool((own_side > 0).all()) == leaks


def test_padding_alone_gives_finite_outputs_and_gradients() -> None:
    """V2 pads have no key at all: a vector of length 0 whose cosine is 0."""
    attn, tables, x = make(STYLES[3], size=(5, 9))
    with torch.no_grad():
        attn.q_bias.zero_()
    y = attn(x.requires_grad_(), tables)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attn.parameters())


def test_half_precision_keeps_the_guard_against_zero_vectors() -> None:
    attn, tables, x = make(STYLES[2], size=(5, 9))
    attn, x = attn.to(torch.float16), torch.zeros_like(x, dtype=torch.float16)
    torch.nn.init.zeros_(attn.q_bias)
    assert attn(x, tables).isfinite().all()


def test_attention_dropout_acts_in_training_only() -> None:
    for impl in ("explicit", "sdpa"):
        attn, tables, x = make(STYLES[0], attn_drop=0.5)
        attn.attention_impl = impl
        attn.train()
        assert not torch.equal(attn(x, tables), attn(x, tables))
        attn.eval()
        assert torch.equal(attn(x, tables), attn(x, tables))
