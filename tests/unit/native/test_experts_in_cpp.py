"""The kernel, or a loop over sources and experts in float64: the same MLPs, forward and backward.

Shapes: N rows, D width, F hidden width.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from swinmoe.errors import BackendUnavailableError
from swinmoe.native import build, experts, why_no_kernels
from swinmoe.native import expert_mlp_backward as backward
from swinmoe.native import expert_mlp_forward as forward

pytestmark = pytest.mark.usefixtures("native_kernels")

ACTIVATIONS: dict[Any, Any] = {"gelu": F.gelu, "relu": F.relu}
NAMES = ("grad_x", "grad_fc1", "grad_b1", "grad_fc2", "grad_b2")
SOME = [[10, 0, 7], [5, 15, 0]]
COUNTS = {
    "two sources, empty segments": SOME,
    "one row": [[0, 1, 0]],
    "none": [[0, 0]],
    "no source": [],
    "one expert": [[61]],
    "whole tiles": [[28, 14, 42]],
    "more than are worked on together": [[3, 900], [1700, 0]],
}


def make(counts: list[list[int]], dim: int, hidden: int, experts: int = 0) -> tuple[Tensor, ...]:
    """Rows, fc1, b1, fc2, b2."""
    torch.manual_seed(0)
    num, rows = experts or len(counts[0]), sum(map(sum, counts))
    w1, w2 = torch.randn(num, hidden, dim) * dim**-0.5, torch.randn(num, dim, hidden) * hidden**-0.5
    return torch.randn(rows, dim), w1, torch.randn(num, hidden) / 4, w2, torch.randn(num, dim)


def factors(rows: int, hidden: int, dropout: float, seed: int) -> Tensor:
    """What dropout multiplies hidden units by (N, F): two published hashes, written out on integers of 64 bits."""
    few, many = np.uint64(2**32 - 1), np.uint64(2**64 - 1)
    z = (np.uint64(seed % 2**64) + np.arange(1, rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) & many
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31)))[:, None]
    x = np.arange(hidden, dtype=np.uint64) ^ (z & few)
    x = (x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D) & few
    x = ((x ^ (x >> np.uint64(15))) + (z >> np.uint64(32))) * np.uint64(0x846CA68B) & few
    dropped = round(dropout * 2**32)
    stays = torch.from_numpy(((x ^ (x >> np.uint64(16))) >= np.uint64(dropped)).astype(np.float64))
    return stays * 2**32 / (2**32 - dropped)


def exact(
    counts: list[list[int]], tensors: tuple[Tensor, ...], slope: Tensor, activation: str, times: Tensor | float = 1.0
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients in float64; hidden units are multiplied by `times` (N, F)."""
    given = [t.double().requires_grad_() for t in tensors]
    x, w1, b1, w2, b2 = given
    sizes = [count for source in counts for count in source]
    pieces = iter(x.split(sizes))
    masks = iter(torch.as_tensor(times).double().expand(len(x), w1.shape[1]).split(sizes))
    out = [x[:0] @ w1[0].t() @ w2[0].t()]
    for source in counts:
        for e in range(len(source)):
            hidden = ACTIVATIONS[activation](next(pieces) @ w1[e].t() + b1[e]) * next(masks)
            out.append(hidden @ w2[e].t() + b2[e])
    y = torch.cat(out)
    grads = torch.autograd.grad(y, given, slope.double(), allow_unused=True, materialize_grads=True)
    return y.detach(), grads


def ours(
    counts: list[list[int]],
    tensors: tuple[Tensor, ...],
    slope: Tensor,
    activation: Any = "gelu",
    dropout: float = 0.0,
    seed: int = 0,
    **given: Any,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output and gradients; where they are written, anything may have been before."""
    x, w1, b1, w2, b2 = tensors
    y, pre = forward(x, counts, w1, b1, w2, b2, activation, True, dropout, seed)
    grads = {n: torch.full(t.shape, float("nan")) for n, t in zip(NAMES, tensors, strict=True)}
    for name in ("grad_b1", "grad_b2"):
        grads[name].zero_()
    grads |= {n: given.pop(n) for n in NAMES if n in given}
    adds = {"add_fc1": False, "add_fc2": False} | given
    backward(slope, x, counts, w1, w2, pre, activation, dropout, seed, **grads, **adds)
    return y, dict(grads)


def close(mine: Tensor | None, other: Tensor) -> None:
    assert mine is not None
    scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
    torch.testing.assert_close(mine.double(), other, rtol=0, atol=3e-6 * scale)


def check(
    counts: list[list[int]], dim: int, hidden: int, activation: str = "gelu", dropout: float = 0.0, seed: int = 0
) -> None:
    """Output and all gradients against `exact`."""
    tensors = make(counts, dim, hidden, experts=0 if counts else 2)
    slope = torch.randn_like(tensors[0])
    y, grads = ours(counts, tensors, slope, activation, dropout, seed)
    times = factors(len(tensors[0]), hidden, dropout, seed) if dropout else 1.0
    expected, others = exact(counts, tensors, slope, activation, times)
    close(y, expected)
    for name, other in zip(NAMES, others, strict=True):
        close(grads[name], other)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dim, hidden", [(40, 50), (32, 64), (1, 1), (96, 33)])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_equals_a_loop_in_double_precision(counts: list[list[int]], dim: int, hidden: int, threads: int) -> None:
    torch.set_num_threads(threads)
    check(counts, dim, hidden)


@pytest.mark.parametrize("dim, hidden", [(224, 208), (224, 200), (210, 208)])
def test_large_maps_go_past_the_caches(dim: int, hidden: int) -> None:
    """Output, the rows' gradients and pre-activations of 2 MB and more, those in two pieces, are streamed if rows are
    whole vectors."""
    torch.set_num_threads(2)
    counts = [[900, 0, 5], [1600, 300, 0]]
    assert 4 * sum(map(sum, counts)) * min(dim, hidden) >= 2**21
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "_CHUNK_BYTES", 4 * hidden * 1500)
        check(counts, dim, hidden)


def test_relu() -> None:
    check(SOME, 40, 50, "relu")


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("seed", [0, -(2**63), 2**63 - 1, 12345])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_dropout_equals_a_loop_with_its_mask(counts: list[list[int]], threads: int, seed: int, activation: str) -> None:
    torch.set_num_threads(threads)
    check(counts, 40, 50, activation, 0.3, seed)


def dropped(rows: int, hidden: int, dropout: float, seed: int) -> Tensor:
    """Hidden units that the kernel drops, as 1 among 0 (N, F): one expert gives them back, none is 0 otherwise."""
    x, eye = torch.ones(rows, hidden), torch.eye(hidden).unsqueeze(0)
    y, _ = forward(x, [[rows]], eye, None, eye, None, "relu", False, dropout, seed)
    others = y[y != 0]
    torch.testing.assert_close(others, torch.full_like(others, 1 / (1 - dropout)))
    return (y == 0).double()


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9])
def test_dropout_takes_the_share_it_says(dropout: float) -> None:
    """Of all, and as evenly over rows and over columns as chance would, to five standard deviations."""
    gone = dropped(2000, 96, dropout, seed=7)
    variance = dropout * (1 - dropout)
    assert abs(gone.mean() - dropout) < 5 * (variance / gone.numel()) ** 0.5
    for dim in (0, 1):
        counts = gone.sum(dim)
        expected = gone.shape[dim] * variance
        kurtosis = 3 + (1 - 6 * variance) / expected  # of a binomial
        assert abs(counts.var() / expected - 1) < 5 * ((kurtosis - 1) / counts.numel()) ** 0.5, dim


def test_units_are_dropped_independently_of_each_other() -> None:
    """Of neighbours in a row and in a column, of what other seeds drop, and of rows that lie as many apart as seeds."""
    gone = dropped(2000, 96, 0.5, seed=7) - 0.5
    pairs = {f"{n} columns on": gone[:, n:] * gone[:, :-n] for n in (1, 2, 4, 8, 16, 32)}
    pairs |= {f"{n} rows on": gone[n:] * gone[:-n] for n in (1, 2, 14, 64)}
    pairs |= {f"seed {s}": gone * (dropped(2000, 96, 0.5, s) - 0.5) for s in (8, 6, 7 + 2**32, -7)}
    pairs["a seed further, a row back"] = (dropped(2000, 96, 0.5, seed=8)[:-1] - 0.5) * gone[1:]
    for name, pair in pairs.items():
        assert abs(pair.mean() * 4) < 5 / pair.numel() ** 0.5, name


def test_what_is_dropped_depends_on_seed_row_and_place_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dropped(60, 50, 0.4, seed=3)
    torch.testing.assert_close(dropped(40, 33, 0.4, seed=3), before[:40, :33])
    torch.set_num_threads(5)
    monkeypatch.setattr(experts, "_CHUNK_BYTES", 3 * 50 * 4)
    torch.testing.assert_close(dropped(60, 50, 0.4, seed=3), before)


@pytest.mark.parametrize("dropout", [1e-30, 1 - 1e-12])
def test_no_dropout_is_too_small_or_too_large(dropout: float) -> None:
    x, w1, b1, w2, b2 = make(SOME, 40, 50)
    y, _ = forward(x, SOME, w1, b1, w2, b2, "gelu", False, dropout, 5)
    expected = b2.repeat_interleave(torch.tensor([10, 0, 7]), 0)
    if dropout < 0.5:
        torch.testing.assert_close(y, forward(x, SOME, w1, b1, w2, b2, "gelu", False)[0])
    else:
        torch.testing.assert_close(y[:17], expected)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_what_is_kept_may_lie_in_pieces(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles end where pieces do."""
    monkeypatch.setattr(experts, "_CHUNK_BYTES", rows * 50 * 4)
    tensors = make(SOME, 40, 50)
    assert len(forward(tensors[0], SOME, *tensors[1:], "gelu", True)[1]) == -(-37 // rows)
    check(SOME, 40, 50)


def test_weight_gradients_are_added_where_asked() -> None:
    """Also to those of experts without rows, which otherwise become 0."""
    tensors = make([[7, 0]], 40, 50)
    slope = torch.randn_like(tensors[0])
    _, others = exact([[7, 0]], tensors, slope, "gelu")
    before = torch.randn_like(tensors[1]), torch.randn_like(tensors[3])
    _, grads = ours([[7, 0]], tensors, slope, grad_fc1=before[0].clone(), grad_fc2=before[1].clone(), add_fc1=True)
    close(grads["grad_fc1"], others[1] + before[0])
    close(grads["grad_fc2"], others[3])
    _, grads = ours([[7, 0]], tensors, slope, grad_fc1=before[0].clone(), grad_fc2=before[1].clone(), add_fc2=True)
    close(grads["grad_fc1"], others[1])
    close(grads["grad_fc2"], others[3] + before[1])


@pytest.mark.parametrize("name", NAMES)
def test_any_gradient_may_be_left_out(name: str) -> None:
    tensors = make(SOME, 40, 50)
    slope = torch.randn_like(tensors[0])
    _, others = exact(SOME, tensors, slope, "gelu")
    _, grads = ours(SOME, tensors, slope, **{name: None})
    assert grads.pop(name) is None
    for other_name, other in zip(NAMES, others, strict=True):
        if other_name != name:
            close(grads[other_name], other)


def test_without_biases_and_without_training() -> None:
    x, w1, _, w2, _ = make(SOME, 40, 50)
    y, pre = forward(x, SOME, w1, None, w2, None, "gelu", False)
    assert pre == []
    none = torch.zeros(3, 50), torch.zeros(3, 40)
    close(y, exact(SOME, (x, w1, none[0], w2, none[1]), x, "gelu")[0])


def test_what_is_not_a_number_stays_where_it_belongs() -> None:
    """In its own row, and in the gradients of its own expert."""
    tensors = make([[20, 20]], 40, 50)
    slope = torch.randn_like(tensors[0])
    clean, clean_grads = ours([[20, 20]], tensors, slope)
    tensors[0][3, 5] = float("nan")
    y, grads = ours([[20, 20]], tensors, slope)
    assert y[3].isnan().all()
    others = torch.arange(40) != 3
    torch.testing.assert_close(y[others], clean[others], rtol=0, atol=0)
    for name in ("grad_fc1", "grad_b1", "grad_fc2", "grad_b2"):
        mine, other = grads[name], clean_grads[name]
        assert mine is not None and other is not None
        assert mine[0].isnan().any() or name == "grad_b2"
        torch.testing.assert_close(mine[1], other[1], rtol=0, atol=0)


def test_the_same_twice_is_the_same_to_the_bit() -> None:
    torch.set_num_threads(2)
    counts = [[3, 900, 50], [1, 800, 2]]
    tensors = make(counts, 72, 100)
    slope = torch.randn_like(tensors[0])
    runs = [ours(counts, tensors, slope) for _ in range(2)]
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_long_sums_keep_their_digits() -> None:
    """All of one sign: what single precision would lose, one row after the other, is a hundred times as much."""
    rows = 60_000
    x, w1, b1, w2, b2 = torch.full((rows, 2), 0.1), *make([[1]], 2, 2)[1:]
    slope = torch.full_like(x, 0.1)
    _, grads = ours([[rows]], (x, w1, b1, w2, b2), slope)
    _, others = exact([[rows]], (x, w1, b1, w2, b2), slope, "gelu")
    for name, other in zip(NAMES, others, strict=True):
        rtol = 5e-6 if "b" in name else 2e-5  # of biases at most 256 rows are summed in single precision
        torch.testing.assert_close(grads[name].double(), other, rtol=rtol, atol=0)


def test_strides_of_what_is_given_do_not_matter() -> None:
    x, w1, b1, w2, b2 = make(SOME, 40, 50)
    slope = torch.randn_like(x)
    turned = tuple(t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (x, w1, b1, w2, b2))
    torch.testing.assert_close(ours(SOME, turned, slope)[0], ours(SOME, (x, w1, b1, w2, b2), slope)[0], rtol=0, atol=0)


def test_are_operators_as_torch_wants_them() -> None:
    x, w1, b1, w2, b2 = make([[5, 4]], 6, 8)
    tests = ("test_schema", "test_faketensor")
    given = (x, [5, 4], w1, b1, w2, b2, "gelu", True, 0.1, 9)
    torch.library.opcheck(torch.ops.swinmoe.expert_mlp.default, given, test_utils=tests)
    _, pre = forward(x, [[5, 4]], w1, b1, w2, b2, "gelu", True)
    written = [torch.zeros_like(t) for t in (x, w1, b1, w2, b2)]
    rest = (x, x, [5, 4], w1, w2, pre, "gelu", 0.1, 9, *written, True, False)
    torch.library.opcheck(torch.ops.swinmoe.expert_mlp_backward.default, rest, test_utils=tests)


@pytest.mark.parametrize("left_out", [None, "grad_x", "grad_fc1"])
def test_flops_are_those_of_the_products(left_out: str | None) -> None:
    tensors = make(SOME, 40, 50)
    with FlopCounterMode(display=False) as counter:
        ours(SOME, tensors, tensors[0], **({left_out: None} if left_out else {}))
    of_one = 2 * 37 * 40 * 50
    assert counter.get_total_flops() == of_one * (2 + (3 if left_out else 4))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(37, 40, dtype=torch.float64)}, "x is torch.float64"),
        ({"x": torch.zeros(37, 41)}, r"give rows \(N, D\), not \(37, 41\)"),
        ({"fc2": torch.zeros(3, 50, 40)}, r"fc2 \(e, D, F\), not \(3, 50, 40\)"),
        ({"b1": torch.zeros(3, 40)}, r"b1 of shape \(3, 40\) must be \(3, 50\)"),
        ({"b2": torch.zeros(40)}, r"b2 of shape \(40,\) must be \(3, 40\)"),
        ({"counts": [[30, 0, 6]]}, "how many of 37 rows each of 3 experts"),
        ({"counts": [[38, 0, -1]]}, "how many of 37 rows each of 3 experts"),
        ({"counts": [[30, 7]]}, "how many of 37 rows each of 3 experts"),
        ({"activation": "tanh"}, "'tanh' is none of gelu, relu"),
        ({"dropout": 1.0}, r"dropout 1.0 is a probability in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout -0.1 is a probability in \[0, 1\)"),
        ({"dropout": float("nan")}, r"dropout nan is a probability in \[0, 1\)"),
    ],
)
def test_what_the_kernel_would_misread_is_refused(change: dict[str, Any], message: str) -> None:
    x, w1, b1, w2, b2 = make(SOME, 40, 50)
    given = {"x": x, "counts": SOME, "fc1": w1, "b1": b1, "fc2": w2, "b2": b2, "activation": "gelu", "training": True}
    with pytest.raises(ValueError, match=message):
        forward(**{**given, **change})


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("grad_x", torch.zeros(36, 40), r"grad_x of shape \(36, 40\)"),
        ("grad_fc1", torch.zeros(3, 40, 50).transpose(1, 2), "grad_fc1 .* contiguous"),
        ("grad_b2", torch.zeros(3, 40, dtype=torch.float64), "grad_b2 is torch.float64"),
    ],
)
def test_places_that_do_not_fit_are_refused(name: str, wrong: Tensor, message: str) -> None:
    tensors = make(SOME, 40, 50)
    with pytest.raises(ValueError, match=message):
        ours(SOME, tensors, tensors[0], **{name: wrong})


def test_pieces_of_another_pass_are_refused() -> None:
    x, w1, b1, w2, b2 = make(SOME, 40, 50)
    _, pre = forward(x[:9], [[9, 0, 0]], w1, b1, w2, b2, "gelu", True)
    none = dict.fromkeys(NAMES)
    with pytest.raises(ValueError, match="not what the forward pass kept"):
        backward(x, x, SOME, w1, w2, pre, "gelu", **none, add_fc1=False, add_fc2=False)


@pytest.mark.parametrize(("lanes", "taken"), [(None, False), (4, False), (8, True), (16, True)])
def test_taken_where_there_is_a_compiler_and_wide_vectors(
    lanes: int | None, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kernels:
        def swinmoe_lanes(self) -> int:
            if lanes is None:
                raise BackendUnavailableError("no compiler")
            return lanes

    monkeypatch.setattr(build, "kernels", Kernels)
    why_no_kernels.cache_clear()
    try:
        assert (why_no_kernels() == "") is taken
    finally:
        why_no_kernels.cache_clear()


def test_nothing_is_read_past_the_end() -> None:
    """Rows narrower than a vector, at the end of a page behind which there is none: what reads on is killed."""
    text = """
import ctypes, mmap, torch
from swinmoe.native import expert_mlp_backward, expert_mlp_forward
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
def at_the_end(t):
    size = -(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    begin = libc.mmap(None, size + mmap.PAGESIZE, 3, 0x22, -1, 0)
    assert libc.mprotect(begin + size, mmap.PAGESIZE, 0) == 0
    there = (ctypes.c_float * t.numel()).from_address(begin + size - t.nbytes)
    copy = torch.frombuffer(there, dtype=torch.float32).view(t.shape)
    copy.copy_(t)
    return copy
for dim, hidden in ((1, 1), (3, 5), (7, 20), (20, 7)):
    sizes = ((9, dim), (1, hidden, dim), (1, hidden), (1, dim, hidden), (1, dim))
    x, w1, b1, w2, b2 = (at_the_end(torch.randn(size)) for size in sizes)
    _, pre = expert_mlp_forward(x, [[9]], w1, b1, w2, b2, "gelu", True)
    names = ("grad_x", "grad_fc1", "grad_b1", "grad_fc2", "grad_b2")
    grads = dict(zip(names, map(torch.zeros_like, (x, w1, b1, w2, b2))))
    grad, pre = at_the_end(torch.randn(9, dim)), [at_the_end(p) for p in pre]
    expert_mlp_backward(grad, x, [[9]], w1, w2, pre, "gelu", **grads, add_fc1=False, add_fc2=False)
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert done.stdout == "alive\n", done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_kept_must_come_back_as_it_was(dtype: torch.dtype) -> None:
    x, w1, b1, w2, b2 = make(SOME, 40, 50)
    _, pre = forward(x, SOME, w1, b1, w2, b2, "gelu", True)
    none = dict.fromkeys(NAMES)
    with pytest.raises(ValueError, match=rf"pre\[0\] is {dtype}"):
        backward(x, x, SOME, w1, w2, [p.to(dtype) for p in pre], "gelu", **none, add_fc1=False, add_fc2=False)
