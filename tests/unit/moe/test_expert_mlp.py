"""The arithmetic of experts: several sources, slices of the hidden width, all code paths, and where gradients land."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from swinmoe.config import ExpertConfig, MoEConfig
from swinmoe.moe import ExpertWeights, MoEMlp
from swinmoe.moe import expert_mlp as module
from swinmoe.moe.activations import Activation, Gelu, Relu, SwiGlu
from swinmoe.moe.expert_mlp import blocked_mlp, blocks_of, expert_mlp, grouped_mlp, plain_mlp

SEGMENTS = [[2, 0, 3], [0, 0, 1], [4, 0, 2]]  # three sources; expert 1 gets nothing
ACTIVATIONS = [Gelu(), Relu(), SwiGlu()]


def make(activation: Activation, dim=4, hidden=8, experts=3, dtype=torch.float64) -> tuple[Tensor, ExpertWeights]:
    gen = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype).requires_grad_()

    wide = activation.rows_per_hidden * hidden
    w = ExpertWeights(draw(experts, wide, dim), draw(experts, wide), draw(experts, dim, hidden), draw(experts, dim))
    return draw(sum(map(sum, SEGMENTS)), dim), w


def tensors(w: ExpertWeights) -> list[Tensor]:
    return [t for t in (w.fc1, w.b1, w.fc2, w.b2) if t is not None]


def row_by_row(rows: Tensor, segments: list[list[int]], w: ExpertWeights, activation: Activation) -> Tensor:
    owner = [expert for source in segments for expert, count in enumerate(source) for _ in range(count)]
    out = []
    for row, e in zip(rows, owner, strict=True):
        pre = w.fc1[e] @ row + (0 if w.b1 is None else w.b1[e])
        out.append(w.fc2[e] @ activation.value(pre) + (0 if w.b2 is None else w.b2[e]))
    return torch.stack(out)


@pytest.mark.parametrize("limit", [1, 2, 10**6])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("path", [plain_mlp, blocked_mlp, grouped_mlp])
def test_rows_of_several_sources(path, activation, limit, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", limit * 8 * 8)
    dtype = torch.float32 if path is grouped_mlp else torch.float64  # the grouped operator has no float64
    tolerance = 1e-4 if path is grouped_mlp else 1e-12
    rows, w = make(activation, dtype=dtype)
    out = path(rows, SEGMENTS, w, activation, 0.0)
    want = row_by_row(rows, SEGMENTS, w, activation)
    torch.testing.assert_close(out, want, atol=tolerance, rtol=0)
    got = torch.autograd.grad(out.sum(), [rows, *tensors(w)])  # a gradient of stride 0
    for g, expected in zip(got, torch.autograd.grad(want.sum(), [rows, *tensors(w)]), strict=True):
        torch.testing.assert_close(g, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("padded", [False, True])
def test_additive_over_slices_of_the_hidden_width(activation, padded):
    rows, w = make(activation)
    a = activation.rows_per_hidden
    segments: Tensor | None = torch.tensor(SEGMENTS)
    if padded:
        rows, segments = rows.view(3, 4, 4), None
    whole = expert_mlp(rows, segments, w, activation)
    parts = []
    for number, (lo, hi) in enumerate(pairwise([0, 3, 4, 8])):
        piece = ExpertWeights(
            w.fc1[:, a * lo : a * hi], w.b1[:, a * lo : a * hi], w.fc2[:, :, lo:hi], w.b2 if number == 0 else None
        )
        parts.append(expert_mlp(rows, segments, piece, activation))
    torch.testing.assert_close(sum(parts), whole, atol=1e-12, rtol=0)
    inputs = [rows, *tensors(w)]
    for g, expected in zip(
        torch.autograd.grad(sum(parts).square().sum(), inputs),
        torch.autograd.grad(whole.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(g, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("behind", [0, 1, 3])
@pytest.mark.parametrize("rows", [0, 1, 5, 6, 7, 8, 9, 12, 40])
def test_products_in_shares_of_threads(rows: int, behind: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written but the rows and those behind them, whose own contents reach no other row."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(module, "SHARE_ROWS", (1, 8))
    weight, memory = torch.randn(6, 4, dtype=torch.float64), torch.randn(rows + 1 + behind, 6, dtype=torch.float64)
    memory[rows + 1 :] = torch.nan
    x = memory[1 : rows + 1]
    whole = torch.full((rows + 2 + behind, 4), 7.0, dtype=torch.float64)
    module._product(x, weight, whole[1 : rows + 1], spare=behind)
    torch.testing.assert_close(whole[1 : rows + 1], torch.einsum("nf,fd->nd", x, weight), atol=1e-13, rtol=0)
    assert whole[0].eq(7).all() and whole[-1].eq(7).all()


def test_rows_that_fill_no_shares_borrow_from_the_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(module, "SHARE_ROWS", (1, 8))
    calls = []
    monkeypatch.setattr(torch, "bmm", lambda *a, **k: calls.append(a[0].shape[1]))
    x, out = torch.randn(8, 6), torch.empty(8, 4)
    for rows, spare in ((6, 0), (7, 1), (7, 0), (8, 1), (5, 1)):
        module._product(x[:rows], torch.randn(6, 4), out[:rows], spare)
    module._product(x[1:], torch.randn(6, 4), out[1:], spare=1)  # there is no memory behind these
    assert calls == [3, 4, 4, 3]


@pytest.mark.parametrize("counts", [[[5, 3, 7]], [[5, 3], [1, 7]], [[7, 0, 5]], [[3, 1], [0, 5], [7, 3]]])
@pytest.mark.parametrize("threads", [2, 3])
def test_shares_that_spill_harm_no_other_block(
    counts: list[list[int]], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where blocks follow each other in memory the next one overwrites what was spilt; elsewhere none may be."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(module, "SHARE_ROWS", (1, 8))
    num_rows = sum(map(sum, counts))
    rows = torch.randn(num_rows, 4, dtype=torch.float64, requires_grad=True)
    e = len(counts[0])
    shapes = ((e, 6, 4), (e, 6), (e, 4, 6), (e, 4))
    fc1, b1, fc2, b2 = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    w, slope = ExpertWeights(fc1, b1, fc2, b2), torch.randn(num_rows, 4, dtype=torch.float64)
    ours, plain = (
        torch.autograd.grad((path(rows, counts, w, Gelu(), 0.0) * slope).sum(), [rows, *tensors(w)])
        for path in (blocked_mlp, plain_mlp)
    )
    for g, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(g, expected, atol=1e-12, rtol=0)


def test_padded_paths_agree():
    rows, w = make(Gelu())
    batched = module._batched(rows.view(3, 4, 4), w, Gelu(), 0.0)
    torch.testing.assert_close(batched, expert_mlp(rows.view(3, 4, 4), None, w, Gelu()), atol=1e-12, rtol=0)


def test_empty_everything_gives_zero_gradients():
    _, w = make(Gelu())
    rows = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    for path in (plain_mlp, blocked_mlp):
        out = path(rows, [[0, 0, 0], [0, 0, 0]], w, Gelu(), 0.0)
        for g in torch.autograd.grad(out.sum(), tensors(w)):
            assert torch.equal(g, torch.zeros_like(g))


def test_blocks_cover_every_row_once_and_keep_an_expert_together():
    blocks = blocks_of([[5, 0, 2], [1, 3, 0]], limit=2)
    assert sorted(r for b in blocks for r in range(b.start, b.stop)) == list(range(11))
    assert [b.expert for b in blocks] == sorted(b.expert for b in blocks)
    assert max(b.stop - b.start for b in blocks) <= 2
    assert [(b.start, b.stop) for b in blocks if b.expert == 1] == [(8, 9), (9, 11)]


def test_custom_activation_needs_no_derivative():
    class SquaredRelu(Activation):
        def value(self, pre: Tensor) -> Tensor:
            return pre.relu().square()

    rows, w = make(SquaredRelu())
    want = torch.autograd.grad(plain_mlp(rows, SEGMENTS, w, SquaredRelu(), 0.0).sum(), tensors(w))
    got = torch.autograd.grad(blocked_mlp(rows, SEGMENTS, w, SquaredRelu(), 0.0).sum(), tensors(w))
    for g, expected in zip(got, want, strict=True):
        torch.testing.assert_close(g, expected, atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------------------ where gradients land


def layer_and_input(**kw) -> tuple[MoEMlp, Tensor]:
    layer = MoEMlp(MoEConfig(num_experts=3, top_k=2, **kw), dim=4, hidden_dim=6, dtype=torch.float64, init_std=1.0)
    return layer, torch.randn(7, 4, dtype=torch.float64)


def expected_gradients(layer: MoEMlp, x: Tensor) -> dict[str, Tensor]:
    fresh = copy.deepcopy(layer)
    fresh.zero_grad(set_to_none=True)
    fresh(x)[0].square().sum().backward()
    return {name: p.grad for name, p in fresh.named_parameters()}


def check(layer: MoEMlp, want: dict[str, Tensor], times: float = 1.0, plus: float = 0.0) -> None:
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, times * want[name] + plus, atol=1e-12, rtol=0, msg=name)


@pytest.fixture
def in_place(monkeypatch) -> list[bool]:
    """Whether each weight's gradient of a backward pass went straight into `.grad`, in order."""
    seen: list[bool] = []

    class Spy(module._WeightGradient):
        def __init__(self, *args):
            super().__init__(*args)
            seen.append(self.in_place)

    monkeypatch.setattr(module, "_WeightGradient", Spy)
    return seen


def test_accumulates_into_existing_gradients_in_place(in_place):
    layer, x = layer_and_input()
    want = expected_gradients(layer, x)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    buffers = [p.grad for p in layer.parameters()]
    layer(x)[0].square().sum().backward()
    check(layer, want, plus=1)
    assert in_place[-2:] == [True, True]
    assert all(p.grad is b for p, b in zip(layer.parameters(), buffers, strict=True))


def test_used_twice_in_one_graph():
    layer, x = layer_and_input()
    want = expected_gradients(layer, x)
    for gradient in (None, torch.zeros):
        for p in layer.parameters():
            p.grad = None if gradient is None else torch.zeros_like(p)
        (layer(x)[0].square().sum() + layer(x)[0].square().sum()).backward()
        check(layer, want, times=2)


def test_retained_graph_walked_twice():
    layer, x = layer_and_input()
    want = expected_gradients(layer, x)
    loss = layer(x)[0].square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    check(layer, want, times=2)


def test_autograd_grad_leaves_grad_alone():
    layer, x = layer_and_input()
    want = expected_gradients(layer, x)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    got = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    for (name, p), g in zip(layer.named_parameters(), got, strict=True):
        torch.testing.assert_close(g, want[name], atol=1e-12, rtol=0)
        assert torch.equal(p.grad, torch.ones_like(p))


def test_backward_of_some_inputs_leaves_the_others_alone():
    layer, x = layer_and_input()
    want = expected_gradients(layer, x)
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    layer(x)[0].square().sum().backward(inputs=[layer.experts.fc2_weight])
    torch.testing.assert_close(layer.experts.fc2_weight.grad, want["experts.fc2_weight"], atol=1e-12, rtol=0)
    assert not layer.experts.fc1_weight.grad.any()


@pytest.mark.parametrize("kind", ["tensor", "post"])
def test_hooks_see_the_gradient(kind):
    layer, x = layer_and_input()
    want = expected_gradients(layer, x)["experts.fc1_weight"]
    p = layer.experts.fc1_weight
    p.grad = torch.zeros_like(p)
    seen = []
    if kind == "tensor":
        p.register_hook(lambda g: seen.append(g.clone()))
    else:
        p.register_post_accumulate_grad_hook(lambda q: seen.append(q.grad.clone()))
    layer(x)[0].square().sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], want, atol=1e-12, rtol=0)
    torch.testing.assert_close(p.grad, want, atol=1e-12, rtol=0)


def test_node_hooks_run_after_the_gradient_is_complete():
    """DDP starts its all-reduce from hooks on the accumulation node."""
    layer, x = layer_and_input()
    want = expected_gradients(layer, x)["experts.fc1_weight"]
    p = layer.experts.fc1_weight
    p.grad = torch.zeros_like(p)
    node = torch.autograd.graph.get_gradient_edge(p).node
    seen = []
    node.register_hook(lambda *_: seen.append(p.grad.clone()))
    layer(x)[0].square().sum().backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], want, atol=1e-12, rtol=0)


class Untouched(Activation):
    """Returns what it is given."""

    def value(self, pre: Tensor) -> Tensor:
        return pre


def identity_experts(width: int) -> ExpertWeights:
    """One expert that gives back its rows, so that dropout shows."""
    eye = torch.eye(width, dtype=torch.float64).unsqueeze(0)
    return ExpertWeights(eye.clone().requires_grad_(), None, eye.clone().requires_grad_(), None)


@pytest.mark.parametrize("dropout", [1e-6, 0.1, 0.5, 0.9])
def test_dropout_takes_the_share_it_says_and_keeps_the_mean(dropout):
    torch.manual_seed(0)
    width, num = 64, 2001
    rows = torch.ones(num, width, dtype=torch.float64)
    kept = blocked_mlp(rows, [[num]], identity_experts(width), Untouched(), dropout).detach()
    assert kept.unique().numel() <= 2
    share, total = (kept == 0).double().mean(), kept.numel()
    wanted = max(dropout, 2**-16)
    assert abs(share - wanted) < 5 * (wanted * (1 - wanted) / total) ** 0.5 + 2**-16
    assert abs(kept.mean() - 1) < 5 * (wanted / (1 - wanted) / total) ** 0.5
    if dropout >= 0.1:  # four units share one draw: neighbours up to there must not know of each other
        flat = (kept == 0).double().flatten() - share
        for shift in range(1, 9):
            alike = (flat[shift:] * flat[:-shift]).mean() / flat.square().mean()
            assert abs(alike) < 5 / total**0.5, shift


@pytest.mark.parametrize("activation", [*ACTIVATIONS, Untouched()], ids=["gelu", "relu", "swiglu", "untouched"])
def test_gradients_of_dropout_are_those_of_its_mask(activation, monkeypatch):
    rows, w = make(activation)
    torch.manual_seed(0)
    keep, scale = module._draw_kept(len(rows), w.fc2.shape[2], 0.3)
    assert 0 < keep.sum() < keep.numel()
    start, want = 0, []
    for source in SEGMENTS:
        for expert, count in enumerate(source):
            here = slice(start, start := start + count)
            hidden = activation.value(rows[here] @ w.fc1[expert].t() + w.b1[expert]) * keep[here] * scale
            want.append(hidden @ w.fc2[expert].t() + w.b2[expert])
    monkeypatch.setattr(module, "BLOCK_BYTES", 2 * w.fc1.shape[1] * 8)
    torch.manual_seed(0)
    out = blocked_mlp(rows, SEGMENTS, w, activation, 0.3)
    torch.testing.assert_close(out, torch.cat(want), atol=1e-12, rtol=0)
    slope = torch.randn(out.shape, dtype=out.dtype)
    got = torch.autograd.grad(out, [rows, *tensors(w)], slope)
    for g, expected in zip(got, torch.autograd.grad(torch.cat(want), [rows, *tensors(w)], slope), strict=True):
        torch.testing.assert_close(g, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_under_activation_checkpointing(persistent, dropout, in_place):
    layer, x = layer_and_input(experts=ExpertConfig(dropout=dropout))
    x.requires_grad_()
    torch.manual_seed(3)
    want = expected_gradients(layer, x)
    if persistent:
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
    torch.manual_seed(3)
    y, _ = checkpoint(layer, x, use_reentrant=False)
    y.square().sum().backward()
    check(layer, want)
    assert in_place[-2:] == [persistent] * 2  # though saved tensors are recomputed ones


def test_frozen_experts_leave_rows_their_gradient():
    layer, x = layer_and_input()
    x.requires_grad_()
    layer(x)[0].sum().backward()
    want = x.grad.clone()
    layer.experts.requires_grad_(False)
    layer.zero_grad()
    x.grad = None
    layer(x)[0].sum().backward()
    torch.testing.assert_close(x.grad, want, atol=1e-12, rtol=0)
    assert layer.experts.fc1_weight.grad is None


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_gradient_meant_to_be_differentiated_is_not_added_blindly(in_place):
    layer, x = layer_and_input()
    p = layer.experts.fc1_weight
    p.grad = torch.zeros_like(p)
    layer(x)[0].square().sum().backward(create_graph=True)
    assert p.grad.requires_grad
    assert in_place == [False, False]
    layer.zero_grad(set_to_none=True)  # else graph and gradients would hold each other


def test_second_derivatives_are_refused_not_wrong():
    layer, x = layer_and_input()
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()
