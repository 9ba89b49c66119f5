"""The kernel or attention written out in float64: the same attention, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from swinmoe.config import StyleConfig
from swinmoe.models.attention import AttentionImpl, WindowAttention, WindowTables
from swinmoe.models.position import log_offsets, relative_index
from swinmoe.models.windows import attention_mask, window_grid
from swinmoe.native import window_attention

pytestmark = [
    pytest.mark.usefixtures("native_kernels"),
    # Dynamo looks at `.grad` of every input, also of one that is no leaf.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

STYLES = {
    "dot, table": StyleConfig(norm="pre", similarity="dot", position_bias="table", merge_norm="before"),
    "cosine, log-cpb": StyleConfig(
        norm="res-post", similarity="cosine", position_bias="log-cpb-sigmoid", merge_norm="after"
    ),
}
MAPS = (
    # map, window, width, heads: widths of heads and windows that are no multiples of a vector, and that are
    ((8, 12), (4, 4), 12, 3),
    ((7, 9), (4, 4), 10, 2),
    ((6, 9), (2, 3), 64, 2),
    ((3, 5), (3, 3), 12, 3),
    ((14, 14), (7, 7), 32, 1),
    ((24, 12), (12, 12), 64, 2),
    ((17, 34), (17, 17), 48, 3),  # rows of scores come in several blocks
)


def layer_and_tables(
    style: str, size: tuple[int, int], window: tuple[int, int], dim: int, heads: int, shifted: bool
) -> tuple[WindowAttention, WindowTables]:
    torch.manual_seed(0)
    layer = WindowAttention(dim, heads, window, STYLES[style])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
        if layer.style.similarity == "cosine":
            layer.logit_scale.copy_(torch.tensor([0.5, 2.0, 9.0])[:heads].view(heads, 1, 1))  # the last above its bound
    grid = window_grid(size, window, shifted=shifted, square=window[0] == window[1], small_map="pad")
    offsets = None
    if layer.style.position_bias != "table":
        offsets = log_offsets(window, window, torch.float32, torch.device("cpu"))
    return layer, WindowTables(grid, relative_index(grid.window, window), offsets, attention_mask(grid, "mask"))


def outcome(layer: WindowAttention, tables: WindowTables, x: Tensor, impl: AttentionImpl) -> list[Tensor]:
    """The output and every gradient."""
    layer.attention_impl = impl
    x = x.clone().requires_grad_()
    y = layer(x, tables)
    slope = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], slope)]


def exact(layer: WindowAttention, tables: WindowTables, x: Tensor) -> list[Tensor]:
    """The outcome of attention written out, in float64."""
    offsets = None if tables.offsets is None else tables.offsets.double()
    wide = WindowTables(tables.grid, tables.index, offsets, tables.mask)
    return outcome(copy.deepcopy(layer).double(), wide, x.double(), "explicit")


def assert_near(got: Sequence[Tensor], expected: Sequence[Tensor], bound: float = 3e-5) -> None:
    """Differences stay below `bound` times the largest number of each tensor."""
    for mine, other in zip(got, expected, strict=True):
        assert mine.shape == other.shape
        difference = (mine.double() - other).abs().max()
        assert difference <= bound * other.abs().max().clamp(min=1e-6), (tuple(mine.shape), difference)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("mask_value", [None, -3.0])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("size", "window", "dim", "heads"), MAPS)
@pytest.mark.parametrize("style", STYLES)
def test_equals_attention_written_out(
    style: str,
    size: tuple[int, int],
    window: tuple[int, int],
    dim: int,
    heads: int,
    shifted: bool,
    mask_value: float | None,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    layer, tables = layer_and_tables(style, size, window, dim, heads, shifted)
    layer.mask_value = mask_value
    x = torch.randn(2, *size, dim)
    assert_near(outcome(layer, tables, x, "native"), exact(layer, tables, x))


def arguments(style: str = "cosine, log-cpb", *, grads: bool = False) -> tuple[Any, ...]:
    """Of `window_attention`, on shifted windows with a mask."""
    torch.manual_seed(2)
    grid = window_grid((8, 8), (4, 4), shifted=True, square=True, small_map="shrink")
    scale = torch.tensor([1.5, 3.0]) if style.startswith("cosine") else None
    tensors = [torch.randn(1, 8, 8, 24), torch.randn(24), torch.randn(2, 49), scale]
    tensors = [None if t is None else t.requires_grad_(grads) for t in tensors]
    return *tensors, relative_index((4, 4), (4, 4)), attention_mask(grid, "mask"), grid.window, grid.shift, None


@pytest.mark.parametrize("style", STYLES)
def test_is_an_operator_as_torch_wants_them(style: str) -> None:
    torch.library.opcheck(torch.ops.swinmoe.window_attention.default, arguments(style, grads=True))
    given = arguments(style)
    out, kept = torch.ops.swinmoe.window_attention(*given)
    torch.library.opcheck(torch.ops.swinmoe.window_attention_backward.default, (torch.randn_like(out), kept, *given))


def test_strides_do_not_matter() -> None:
    qkv, *rest = arguments()
    turned = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    torch.testing.assert_close(window_attention(turned, *rest), window_attention(qkv, *rest), rtol=0, atol=0)


def test_the_same_twice() -> None:
    """To the bit, whatever the threads do, and whatever a call before left in their memory."""
    torch.set_num_threads(3)
    given = arguments(grads=True)
    wanted = [t for t in given[:4] if t is not None]

    def run() -> list[Tensor]:
        y = window_attention(*given)
        return [y, *torch.autograd.grad(y.square().sum(), wanted)]

    first = run()
    layer, tables = layer_and_tables("dot, table", (17, 34), (17, 17), 48, 3, True)
    outcome(layer, tables, torch.randn(2, 17, 34, 48), "native")
    torch.testing.assert_close(run(), first, rtol=0, atol=0)


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("style", STYLES)
def test_what_is_no_number_stays_none_and_stays_at_home(style: str, part: int) -> None:
    """Of a query, a key or a value of one image: a loss must not look finite, nor other images be lost."""
    qkv, *rest = arguments(style)
    qkv = qkv.repeat(3, 1, 1, 1)
    qkv[1, 3, 3, 8 * part + 1] = float("nan")
    qkv.requires_grad_()
    y = window_attention(qkv, *rest)
    (grad,) = torch.autograd.grad(y[0].sum() + y[2].sum(), qkv)
    assert y[1].isnan().any() and not y[1].isnan().all()
    assert y[[0, 2]].isfinite().all() and grad[[0, 2]].isfinite().all()


def test_a_vanishing_temperature_has_finite_gradients() -> None:
    given = list(arguments(grads=True))
    given[3] = torch.tensor([0.0, 1e-40], requires_grad=True)
    y = window_attention(*given)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.square().sum(), given[:4]))


def test_sums_over_many_windows_keep_their_digits() -> None:
    """Of a bias's gradient over 16,000 windows, all of one sign."""
    index, window, depth = relative_index((2, 2), (2, 2)), (2, 2), 4
    qkv = torch.randn(64, 32, 32, 3 * depth)
    bias = torch.zeros(1, 9)
    qkv_bias = torch.zeros(3 * depth)
    slope = torch.rand(64, 32, 32, depth)
    qkv, bias, qkv_bias = (t.requires_grad_() for t in (qkv, bias, qkv_bias))
    y = window_attention(qkv, qkv_bias, bias, None, index, None, window, (0, 0))
    grads = torch.autograd.grad(y, [qkv, qkv_bias], slope)
    exact = grads[0].double().sum((0, 1, 2))
    # Of values alone: gradients of queries and keys cancel.
    torch.testing.assert_close(grads[1].double()[8:], exact[8:], rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    ("place", "other", "message"),
    [
        (0, lambda t: t.double(), "qkv is torch.float64"),
        (2, lambda t: t.bfloat16(), "bias is torch.bfloat16"),
        (1, lambda t: t[:1], "qkv_bias is .*must be torch.float32 of shape"),
        (3, lambda t: t[:1], "head_scale is .*must be"),
        (4, lambda t: t.int(), "index is .*must be torch.int64"),
        (5, lambda t: t[:1], "mask is .*must be torch.bool"),
        (6, lambda _: (3, 3), "windows of 3x3 do not divide a map of 8x8"),
        (7, lambda _: (0, -1), r"a shift by \(0, -1\)"),
    ],
)
def test_what_does_not_fit_is_refused(place: int, other: Callable[[Any], Any], message: str) -> None:
    given = list(arguments())
    given[place] = other(given[place])
    with pytest.raises(ValueError, match=message):
        window_attention(*given)


def test_forward_mode_derivatives_are_refused() -> None:
    """Rather than lost: an operator without them passes values alone."""
    qkv, *rest = arguments()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        window_attention(forward_ad.make_dual(qkv, torch.ones_like(qkv)), *rest)


def test_too_little_memory_is_an_error_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def swinmoe_window_attention_forward(self, *_: Any) -> int:
            return 1

    monkeypatch.setattr("swinmoe.native.attention.kernels", Full)
    with pytest.raises(MemoryError, match="no memory for its threads"):
        window_attention(*arguments())


def test_flops_are_counted() -> None:
    """As those of attention written out, whose scores are not made twice."""
    layer, tables = layer_and_tables("dot, table", (8, 12), (4, 4), 12, 3, True)
    x, counted = torch.randn(2, 8, 12, 12), {}
    for impl in ("explicit", "native"):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            layer.attention_impl = impl
            layer(x, tables)
        with FlopCounterMode(display=False) as both:
            layer(x.clone().requires_grad_(), tables).sum().backward()
        counted[impl] = (forward.get_total_flops(), both.get_total_flops())
    scores = 2 * 2 * 96 * 16 * 12
    assert counted["native"] == (counted["explicit"][0], counted["explicit"][1] + scores)


def test_a_window_far_from_zero_and_hidden_pairs_underflow_to_nothing() -> None:
    qkv, _, bias, *_ = arguments("dot, table")
    index, grid = relative_index((4, 4), (4, 4)), ((4, 4), (0, 0))
    bias = bias * 1000
    mine = window_attention(qkv, None, bias, None, index, None, *grid)
    parts = qkv.double().view(1, 2, 4, 2, 4, 3, 2, 4).permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, 4, 2, 16, 4)
    q, k, v = parts
    scores = q @ k.transpose(-2, -1) / 2 + bias.double().index_select(1, index).view(2, 16, 16)
    expected = (scores.softmax(-1) @ v).view(1, 2, 2, 2, 4, 4, 4).permute(0, 1, 4, 2, 5, 3, 6).reshape(1, 8, 8, 8)
    torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-4)


def test_no_images_are_no_work() -> None:
    given = list(arguments(grads=True))
    given[0] = torch.randn(0, 8, 8, 24, requires_grad=True)
    y = window_attention(*given)
    assert y.shape == (0, 8, 8, 8)
    grads = torch.autograd.grad(y.sum(), given[:4])
    assert grads[0].shape == (0, 8, 8, 24) and all(not g.any() for g in grads[1:])


def test_second_derivatives_are_refused() -> None:
    given = arguments(grads=True)
    (grad,) = torch.autograd.grad(window_attention(*given).square().sum(), given[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_impl='explicit'"):
        grad.sum().backward()
