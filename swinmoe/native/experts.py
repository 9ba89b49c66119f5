"""Experts' MLPs by a kernel of our own (`expert_mlp.cpp`), forward and backward.

Shapes: N rows ordered (source, local expert), S sources, e experts here, D width, F hidden width.

Products of few rows with the weights of one expert wait for these weights, one expert after the other; weights of many
experts and their gradients fit into no cache. The kernel asks for a panel of weights while it multiplies the one
before, applies bias and activation to a tile while it is in the cache, and writes weight gradients to their final
place. What it works in, tens of MB, stays with the calling thread and is unknown to torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from swinmoe.native.build import kernels
from swinmoe.native.huge_pages import use_huge_pages
from swinmoe.native.operators import address, define, expect, expect_numbers, finish

Activation = Literal["gelu", "relu"]
_ACTIVATIONS = ("gelu", "relu")

_CHUNK_BYTES = 30 * 2**20
"""Size up to which pre-activations lie together: glibc maps and unmaps what is larger than 32 MB with each step, and
touching fresh pages costs as much as the activation itself."""


def expert_mlp_forward(
    x: Tensor,
    counts: Sequence[Sequence[int]],
    fc1: Tensor,
    b1: Tensor | None,
    fc2: Tensor,
    b2: Tensor | None,
    activation: Activation,
    training: bool,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """fc2_e(dropout(activation(fc1_e(row)))) for the rows of every expert e; float32 on a CPU, and no autograd.

    Args:
        x: (N, D).
        counts: (S, e), rows of each source and expert; their sum is N.
        fc1, b1, fc2, b2: (e, F, D), (e, F) or None, (e, D, F), (e, D) or None.
        activation: "gelu", exact, or "relu".
        training: whether to keep what the backward pass needs.
        dropout: probability, in [0, 1), rounded to 1/2^32; those that stay are scaled so that the mean stays.
        seed: any int64; it, a unit's row and its place there decide whether that stays, whatever else there is.

    Returns:
        (N, D), and pre-activations in pieces, which are empty where nothing is kept.

    Raises:
        BackendUnavailableError: the kernel could not be compiled.
        ValueError: other numbers or shapes than these.
    """
    flat = [count for source in counts for count in source]
    given = torch.ops.swinmoe.expert_mlp(x, flat, fc1, b1, fc2, b2, activation, training, dropout, seed)
    return cast(tuple[Tensor, list[Tensor]], given)


def expert_mlp_backward(
    grad: Tensor,
    x: Tensor,
    counts: Sequence[Sequence[int]],
    fc1: Tensor,
    fc2: Tensor,
    pre: Sequence[Tensor],
    activation: Activation,
    dropout: float = 0.0,
    seed: int = 0,
    *,
    grad_x: Tensor | None,
    grad_fc1: Tensor | None,
    grad_b1: Tensor | None,
    grad_fc2: Tensor | None,
    grad_b2: Tensor | None,
    add_fc1: bool,
    add_fc2: bool,
) -> None:
    """Write gradients where they belong; of those that are None, nobody wants any.

    Args:
        grad: (N, D), of the output.
        x, counts, fc1, fc2, activation, dropout, seed: as they were given forward.
        pre: what the forward pass kept.
        grad_x: (N, D), contiguous; written.
        grad_fc1, grad_fc2: like the weights, contiguous; written, or added to what is there with `add_fc1`, `add_fc2`.
        grad_b1, grad_b2: (e, F), (e, D), contiguous; added to what is there.

    Raises:
        BackendUnavailableError: the kernel could not be compiled.
        ValueError: other numbers or shapes than these.
    """
    flat = [count for source in counts for count in source]
    given = (grad, x, flat, fc1, fc2, pre, activation, dropout, seed)
    wanted = (grad_x, grad_fc1, grad_b1, grad_fc2, grad_b2)
    torch.ops.swinmoe.expert_mlp_backward(*given, *wanted, add_fc1, add_fc2)


def _forward(
    x: Tensor,
    counts: list[int],
    fc1: Tensor,
    b1: Tensor | None,
    fc2: Tensor,
    b2: Tensor | None,
    activation: str,
    training: bool,
    dropout: float,
    seed: int,
) -> tuple[Tensor, list[Tensor]]:
    x, fc1, fc2 = x.contiguous(), fc1.contiguous(), fc2.contiguous()
    b1, b2 = (None if b is None else b.contiguous() for b in (b1, b2))
    sizes = _sizes(x, counts, fc1, fc2, activation, b1=b1, b2=b2)
    out, pre = _forward_shapes(x, counts, fc1, b1, fc2, b2, activation, training, dropout, seed)
    for piece in pre:
        use_huge_pages(piece, move=False)
    kept = _addresses(pre) if training else None
    told = (*sizes, _numbers(counts), *_dropping(dropout, seed))
    finish(kernels().swinmoe_expert_mlp_forward(*told, *map(address, (x, fc1, b1, fc2, b2, out)), kept))
    return out, pre


def _forward_shapes(
    x: Tensor,
    counts: list[int],
    fc1: Tensor,
    b1: Tensor | None,
    fc2: Tensor,
    b2: Tensor | None,
    activation: str,
    training: bool,
    dropout: float,
    seed: int,
) -> tuple[Tensor, list[Tensor]]:
    rows, hidden = x.shape[0], fc1.shape[1]
    step = _rows_of_chunk(hidden)
    starts = range(0, rows, step) if training else ()
    pre = [x.new_empty(min(step, rows - start), hidden) for start in starts]
    return x.new_empty(rows, fc2.shape[1]), pre


def _backward(
    grad: Tensor,
    x: Tensor,
    counts: list[int],
    fc1: Tensor,
    fc2: Tensor,
    pre: list[Tensor],
    activation: str,
    dropout: float,
    seed: int,
    grad_x: Tensor | None,
    grad_fc1: Tensor | None,
    grad_b1: Tensor | None,
    grad_fc2: Tensor | None,
    grad_b2: Tensor | None,
    add_fc1: bool,
    add_fc2: bool,
) -> None:
    grad, x, fc1, fc2 = grad.contiguous(), x.contiguous(), fc1.contiguous(), fc2.contiguous()
    written = {"grad_x": grad_x, "grad_fc1": grad_fc1, "grad_b1": grad_b1, "grad_fc2": grad_fc2, "grad_b2": grad_b2}
    sizes = _sizes(x, counts, fc1, fc2, activation, grad=grad, **written)
    experts, hidden, dim = fc1.shape
    shapes = {"grad_x": x.shape, "grad_fc1": fc1.shape, "grad_b1": (experts, hidden)}
    shapes |= {"grad_fc2": fc2.shape, "grad_b2": (experts, dim), "grad": x.shape}
    for name, t in {"grad": grad, **written}.items():
        if t is not None:
            fits = t.shape == shapes[name] and t.is_contiguous()
            expect(fits, f"{name} of shape {tuple(t.shape)} must be contiguous and of shape {tuple(shapes[name])}")
    pre = [p.contiguous() for p in pre]  # what was saved may come back otherwise laid out
    expect_numbers(**{f"pre[{i}]": p for i, p in enumerate(pre)})
    _, like = _forward_shapes(x.to("meta"), counts, fc1, None, fc2, None, activation, True, dropout, seed)
    expect(
        [p.shape for p in pre] == [p.shape for p in like],
        "pre is not what the forward pass kept of these rows; give it as it was returned",
    )
    places = (*map(address, (grad, x, fc1, fc2)), _addresses(pre), *map(address, written.values()))
    adds = map(ctypes.c_int64, (add_fc1, add_fc2))
    told = (*sizes, _numbers(counts), *_dropping(dropout, seed))
    finish(kernels().swinmoe_expert_mlp_backward(*told, *places, *adds))


def _sizes(
    x: Tensor, counts: list[int], fc1: Tensor, fc2: Tensor, activation: str, **others: Tensor | None
) -> tuple[ctypes.c_int64, ...]:
    """What the kernel is told of shapes, once they are what it takes for granted."""
    expect_numbers(x=x, fc1=fc1, fc2=fc2, **others)
    expect(x.dim() == 2 and fc1.dim() == 3, f"x of shape {tuple(x.shape)} must be (N, D), fc1 (e, F, D)")
    experts, hidden, dim = fc1.shape
    expect(
        x.shape[1] == dim and fc2.shape == (experts, dim, hidden),
        f"fc1 of shape {tuple(fc1.shape)} is (e, F, D): give rows (N, D), not {tuple(x.shape)}, and fc2 (e, D, F), "
        f"not {tuple(fc2.shape)}",
    )
    for name, width in (("b1", hidden), ("b2", dim)):
        bias = others.get(name)
        fits = bias is None or bias.shape == (experts, width)
        expect(fits, f"{name} of shape {tuple(() if bias is None else bias.shape)} must be ({experts}, {width})")
    legal = experts > 0 and hidden > 0 and dim > 0 and len(counts) % experts == 0 and min(counts, default=0) >= 0
    expect(
        legal and sum(counts) == len(x),
        f"{len(counts)} counts {counts} do not say how many of {len(x)} rows each of {experts} experts has",
    )
    expect(activation in _ACTIVATIONS, f"activation {activation!r} is none of {', '.join(_ACTIVATIONS)}")
    sizes = (len(counts) // experts, experts, dim, hidden, _rows_of_chunk(hidden))
    return tuple(map(ctypes.c_int64, (*sizes, _ACTIVATIONS.index(activation), torch.get_num_threads())))


def _dropping(dropout: float, seed: int) -> tuple[ctypes.c_uint64, ctypes.c_uint32, ctypes.c_float]:
    """What the kernel is told of dropout: a seed, how many of 2^32 units go, and the factor of those that stay."""
    expect(0 <= dropout < 1, f"dropout {dropout} is a probability in [0, 1)")
    most = 2**32 - 1
    dropped = min(max(round(dropout * 2**32), 1), most) if dropout else 0
    return ctypes.c_uint64(seed % 2**64), ctypes.c_uint32(dropped), ctypes.c_float(2**32 / (2**32 - dropped))


def _rows_of_chunk(hidden: int) -> int:
    return max(1, _CHUNK_BYTES // (4 * max(1, hidden)))


def _numbers(counts: list[int]) -> Any:
    return (ctypes.c_int64 * len(counts))(*counts)


def _addresses(pieces: list[Tensor]) -> Any:
    return (ctypes.c_void_p * len(pieces))(*(piece.data_ptr() for piece in pieces))


define(
    "expert_mlp",
    "(Tensor x, int[] counts, Tensor fc1, Tensor? b1, Tensor fc2, Tensor? b2, str activation, bool training,"
    " float dropout, int seed) -> (Tensor, Tensor[])",
    _forward,
    _forward_shapes,
)
define(
    "expert_mlp_backward",
    "(Tensor grad, Tensor x, int[] counts, Tensor fc1, Tensor fc2, Tensor[] pre, str activation, float dropout,"
    " int seed, Tensor(a!)? grad_x, Tensor(b!)? grad_fc1, Tensor(c!)? grad_b1, Tensor(d!)? grad_fc2,"
    " Tensor(e!)? grad_b2, bool add_fc1, bool add_fc2) -> ()",
    _backward,
    lambda *_: None,
)


@register_flop_formula(torch.ops.swinmoe.expert_mlp)
def _flops(x: Sequence[int], counts: Any, fc1: Sequence[int], *_: Any, out_val: Any = None, **__: Any) -> int:
    """Of both products."""
    return 2 * 2 * x[0] * fc1[1] * fc1[2]


@register_flop_formula(torch.ops.swinmoe.expert_mlp_backward)
def _flops_backward(
    grad: Sequence[int], x: Sequence[int], counts: Any, fc1: Sequence[int], fc2: Any, pre: Any, activation: Any,
    dropout: Any, seed: Any, grad_x: Any, grad_fc1: Any, grad_b1: Any, grad_fc2: Any, *_: Any, out_val: Any = None,
    **__: Any,
) -> int:  # fmt: skip
    """That of the hidden units' gradients, and one for each of the others that is wanted."""
    return 2 * x[0] * fc1[1] * fc1[2] * (1 + sum(t is not None for t in (grad_x, grad_fc1, grad_fc2)))
