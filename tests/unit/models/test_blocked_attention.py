"""Block by block or written out: the same attention, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from swinmoe.config import StyleConfig
from swinmoe.models import blocked_attention as blocked
from swinmoe.models.attention import AttentionImpl, WindowAttention, WindowTables
from swinmoe.models.position import log_offsets, relative_index
from swinmoe.models.windows import attention_mask, window_grid

STYLES = {
    "dot, table": StyleConfig(norm="pre", similarity="dot", position_bias="table", merge_norm="before"),
    "cosine, log-cpb": StyleConfig(
        norm="res-post", similarity="cosine", position_bias="log-cpb-sigmoid", merge_norm="after"
    ),
}


def layer_and_tables(
    style: StyleConfig, size: tuple[int, int], window: tuple[int, int], shifted: bool
) -> tuple[WindowAttention, WindowTables]:
    torch.manual_seed(0)
    layer = WindowAttention(12, 3, window, style).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
        if style.similarity == "cosine":
            layer.logit_scale.copy_(torch.tensor([0.5, 2.0, 9.0]).view(3, 1, 1))  # the last above its bound
    grid = window_grid(size, window, shifted=shifted, square=window[0] == window[1], small_map="shrink")
    offsets = None
    if style.position_bias != "table":
        offsets = log_offsets(window, window, torch.float64, torch.device("cpu"))
    index = relative_index(grid.window, window)
    return layer, WindowTables(grid, index, offsets, attention_mask(grid, "mask"))


def outcome(layer: WindowAttention, tables: WindowTables, x: Tensor, impl: AttentionImpl) -> list[Tensor]:
    """The output and every gradient."""
    layer.attention_impl = impl
    x = x.clone().requires_grad_()
    y = layer(x, tables)
    slope = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], slope)]


@pytest.mark.parametrize("mask_value", [None, -3.0])
@pytest.mark.parametrize("block_bytes", [1, 4000, 10**9])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("size", "window"), [((8, 12), (4, 4)), ((7, 9), (4, 4)), ((6, 9), (2, 3)), ((3, 5), (3, 3))])
@pytest.mark.parametrize("style", STYLES)
def test_equals_attention_written_out(
    monkeypatch: pytest.MonkeyPatch,
    style: str,
    size: tuple[int, int],
    window: tuple[int, int],
    shifted: bool,
    block_bytes: int,
    mask_value: float | None,
) -> None:
    """With rows of windows alone, several in a block, and all images in one."""
    monkeypatch.setattr(blocked, "BLOCK_BYTES", block_bytes)
    layer, tables = layer_and_tables(STYLES[style], size, window, shifted)
    layer.mask_value = mask_value
    x = torch.randn(5, *size, 12, dtype=torch.float64)
    torch.testing.assert_close(
        outcome(layer, tables, x, "auto"), outcome(layer, tables, x, "explicit"), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("style", STYLES)
def test_gradients_are_derivatives(style: str) -> None:
    layer, tables = layer_and_tables(STYLES[style], (4, 4), (2, 2), True)
    layer.attention_impl = "auto"
    x = torch.randn(2, 4, 4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x, tables), x, fast_mode=True)


def arguments(style: str, *, grads: bool) -> tuple[object, ...]:
    """What `blocked_attention` is called with, for its operator: window, mask's value and `training` at the end."""
    layer, tables = layer_and_tables(STYLES[style], (8, 8), (4, 4), True)
    qkv = torch.randn(2, 8, 8, 36, dtype=torch.float64, requires_grad=grads)
    qkv_bias = torch.randn(36, dtype=torch.float64, requires_grad=grads)
    scale = torch.rand(3, dtype=torch.float64).requires_grad_(grads) if style.startswith("cosine") else None
    bias = layer.offset_bias(tables).detach().requires_grad_(grads)
    return qkv, qkv_bias, bias, scale, tables.index, tables.mask, (4, 4), None, grads


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_the_operator_is_what_it_says_to_a_compiler(style: str, grads: bool) -> None:
    """Schema, shapes, registered gradients, and the same traced: torch's own checks."""
    torch.library.opcheck(torch.ops.swinmoe.blocked_attention.default, arguments(style, grads=grads))


@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("style", STYLES)
def test_so_is_the_operator_of_its_backward_pass(style: str, wanted: tuple[bool, bool]) -> None:
    given = arguments(style, grads=False)
    out, *kept = torch.ops.swinmoe.blocked_attention(*given[:-1], True)
    bias, scale, index = given[2:5]
    assert isinstance(bias, Tensor)
    rest = (scale, index, list(bias.shape), [4, 4], list(wanted))
    torch.library.opcheck(torch.ops.swinmoe.blocked_attention_backward.default, (torch.randn_like(out), *kept, *rest))


@pytest.mark.parametrize("style", STYLES)
def test_the_operator_equals_what_runs_without_a_compiler(style: str) -> None:
    given = arguments(style, grads=True)
    inputs = [t for t in given[:4] if isinstance(t, Tensor)]
    run = blocked._BlockedAttention.apply(*given)
    compiled = torch.ops.swinmoe.blocked_attention(*given)[0]
    slope = torch.randn_like(run)
    assert torch.equal(run, compiled)
    for one, other in zip(
        torch.autograd.grad(run, inputs, slope), torch.autograd.grad(compiled, inputs, slope), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("style", STYLES)
def test_second_derivatives_are_refused(style: str) -> None:
    """Also of a parameter that the first derivative reaches by another way, which would be wrong in silence."""
    layer, tables = layer_and_tables(STYLES[style], (4, 4), (2, 2), True)
    x = torch.randn(2, 4, 4, 12, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="explicit"):
        torch.autograd.grad(layer(x, tables).square().sum(), x, create_graph=True)
    layer.attention_impl = "explicit"
    (first,) = torch.autograd.grad(layer(x, tables).square().sum(), x, create_graph=True)
    torch.autograd.grad(first.square().sum(), layer.qkv.weight)


def test_the_operator_refuses_second_derivatives_too() -> None:
    given = arguments("dot, table", grads=True)
    qkv, bias = given[0], given[2]
    assert isinstance(qkv, Tensor)
    out = torch.ops.swinmoe.blocked_attention(*given)[0]
    (first,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="explicit"):
        torch.autograd.grad(first.square().sum(), bias)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[int]]:
    seen: list[Sequence[int]] = []
    original = blocked.blocked_attention

    def spy(qkv: Tensor, *rest: object) -> Tensor:
        seen.append(qkv.shape)
        return original(qkv, *rest)

    monkeypatch.setattr("swinmoe.models.attention.blocked_attention", spy)
    return seen


def test_is_what_auto_takes_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch)
    layer, tables = layer_and_tables(STYLES["dot, table"], (8, 8), (4, 4), False)
    x = torch.randn(1, 8, 8, 12, dtype=torch.float64)
    layer(x, tables)
    assert len(seen) == 1
    layer.attention_impl = "sdpa"
    layer(x, tables)
    layer.attention_impl, layer.attn_drop = "auto", 0.1
    layer(x, tables)  # dropout needs weights of its own
    assert len(seen) == 1
    layer.eval()
    layer(x, tables)
    assert len(seen) == 2


def test_nothing_is_kept_where_no_backward_pass_follows() -> None:
    layer, tables = layer_and_tables(STYLES["dot, table"], (8, 8), (4, 4), False)
    x = torch.randn(1, 8, 8, 12, dtype=torch.float64)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.no_grad():
        layer(x, tables)
    assert not kept


def test_a_token_of_zeros_has_no_direction() -> None:
    """Padding in V2: keys without a bias are exactly zero there."""
    layer, tables = layer_and_tables(STYLES["cosine, log-cpb"], (4, 4), (2, 2), False)
    x = torch.randn(1, 4, 4, 12, dtype=torch.float64)
    x[:, 1] = 0
    torch.testing.assert_close(
        outcome(layer, tables, x, "auto"), outcome(layer, tables, x, "explicit"), rtol=1e-11, atol=1e-12
    )
