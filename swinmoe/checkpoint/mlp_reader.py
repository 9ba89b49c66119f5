"""Is this module an MLP that experts can compute, and with which weights? Asked of the module itself, by calling it.

Names and attributes say little (a functional GELU leaves no trace, a norm inside changes everything), so a copy of the
module is run in float64 on a few random tokens, and what it returns is held against what experts would.

Shapes: D width, F hidden units, R rows of fc1 per hidden unit (SwiGLU: 2).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swinmoe.checkpoint.upcycle import DenseMlp
from swinmoe.errors import ConfigError
from swinmoe.moe import MoEMlp
from swinmoe.moe.activations import Activation
from swinmoe.moe.registry import EXPERTS
from swinmoe.randomness import generator

_TOKENS = 64
_TOLERANCE = 1e-9
"""Of the largest output, in float64: the two common GELUs differ by more than 1e-6."""


@dataclass(frozen=True)
class ReadMlp:
    """An MLP in the terms of experts."""

    kind: str
    """Registered name of the experts that compute the same."""
    weights: DenseMlp
    inner_dropout: float
    """After the activation."""
    outer_dropout: float
    """After fc2."""

    @property
    def dim(self) -> int:
        """D."""
        return int(self.weights.fc2.shape[0])


def looks_like_mlp(module: nn.Module) -> bool:
    """Two linear layers from D back to D among its children, or three (gated), and nothing else with parameters."""
    if isinstance(module, MoEMlp) or any(True for _ in module.parameters(recurse=False)):
        return False
    children = list(module.children())
    linears = [child for child in children if isinstance(child, nn.Linear)]
    others = [child for child in children if not isinstance(child, nn.Linear)]
    if len(linears) not in (2, 3) or any(True for child in others for _ in child.parameters()):
        return False
    *first, last = linears
    rows = sum(child.out_features for child in first)
    # one matrix, or two packed into one or apart; attention has three of D rows before its last
    fitting = (last.in_features, 2 * last.in_features) if len(first) == 1 else (2 * last.in_features,)
    return rows in fitting and all(child.in_features == last.out_features for child in first)


def read_mlp(module: nn.Module, name: str) -> ReadMlp:
    """Read an MLP by calling a copy of it.

    Raises:
        ConfigError: its weights are not there, or it computes nothing that registered experts do.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ConfigError(f"{name!r} has no weights yet (they are on the meta device); load them first")
    calls, dropouts, x, y = _call(module, name)
    for kind, weights in _candidates(calls):
        activation: Activation = EXPERTS.get(kind).activation
        if _close(_compute(weights, activation, x), y):
            inner, outer = dropouts
            return ReadMlp(kind, weights, inner, outer)
    raise ConfigError(
        f"{name!r} ({type(module).__name__}) computes nothing that experts do: fc2(act(fc1 x)) with act one of "
        f"{EXPERTS.names()}; leave it dense, or register experts with its activation (docs/howto/extend.md)"
    )


def _call(module: nn.Module, name: str) -> tuple[list[nn.Linear], tuple[float, float], Tensor, Tensor]:
    """Linear layers in the order of their calls, dropout before and after the last of them, input and output."""
    probe = copy.deepcopy(module).to("cpu", torch.float64).eval()
    order: list[str] = []
    for path, part in probe.named_modules():
        if isinstance(part, nn.Linear | nn.Dropout):
            part.register_forward_hook(lambda *_, path=path: order.append(path))
    width = next(part for part in probe.modules() if isinstance(part, nn.Linear)).in_features
    x = torch.randn(1, _TOKENS, width, dtype=torch.float64, generator=generator("an MLP's probe"))
    try:
        with torch.no_grad():
            y = probe(x)
    except Exception as error:
        raise ConfigError(
            f"{name!r} ({type(module).__name__}) cannot be called with tokens (batch, tokens, {width}): {error}; "
            "name an MLP that takes them as they are"
        ) from error
    called = [(path, module.get_submodule(path)) for path in order]
    linears = [(at, part) for at, (_, part) in enumerate(called) if isinstance(part, nn.Linear)]
    last = linears[-1][0] if linears else 0
    drops = [(at, part.p) for at, (_, part) in enumerate(called) if isinstance(part, nn.Dropout) and part.p > 0]
    inner = max((p for at, p in drops if at < last), default=0.0)
    outer = max((p for at, p in drops if at > last), default=0.0)
    return [part for _, part in linears], (inner, outer), x, y


def _candidates(calls: list[nn.Linear]) -> Iterator[tuple[str, DenseMlp]]:
    """What experts might compute the same as these linear layers, one after the other."""
    if len(calls) == 2:
        fc1, fc2 = calls
        if fc1.out_features == fc2.in_features:
            single = [k for k in EXPERTS.names() if _rows(k) == 1]
            yield from ((kind, _mlp(fc1.weight, fc1.bias, fc2)) for kind in single)
        elif fc1.out_features == 2 * fc2.in_features:
            first, second = fc1.weight.chunk(2)
            b_first, b_second = (None, None) if fc1.bias is None else fc1.bias.chunk(2)
            yield from _gated((first, b_first), (second, b_second), fc2)
    elif len(calls) == 3:
        one, two, fc2 = calls
        if one.weight.shape == two.weight.shape and one.out_features == fc2.in_features:
            yield from _gated((one.weight, one.bias), (two.weight, two.bias), fc2)


def _gated(
    one: tuple[Tensor, Tensor | None], two: tuple[Tensor, Tensor | None], fc2: nn.Linear
) -> Iterator[tuple[str, DenseMlp]]:
    """Two matrices of one gated MLP, either of which may be the gate."""
    if (one[1] is None) != (two[1] is None):
        return
    for kind in (k for k in EXPERTS.names() if _rows(k) == 2):
        for (value, b_value), (gate, b_gate) in ((one, two), (two, one)):
            fc1 = torch.stack((value, gate), 1).flatten(0, 1)
            b1 = None if b_value is None or b_gate is None else torch.stack((b_value, b_gate), 1).flatten()
            yield kind, _mlp(fc1, b1, fc2)


def _mlp(fc1: Tensor, b1: Tensor | None, fc2: nn.Linear) -> DenseMlp:
    # of a layer without a bias, `bias` is None, which torch's types do not say
    return DenseMlp(fc1.detach(), _detached(b1), fc2.weight.detach(), _detached(fc2.bias))


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to("cpu", torch.float64)


def _rows(kind: str) -> int | None:
    activation = getattr(EXPERTS.get(kind), "activation", None)
    return activation.rows_per_hidden if isinstance(activation, Activation) else None


def _compute(mlp: DenseMlp, activation: Activation, x: Tensor) -> Tensor:
    """In the precision and place of `x`."""
    hidden = activation.value(nn.functional.linear(x, mlp.fc1.to(x), _wide(mlp.b1)))
    return nn.functional.linear(hidden, mlp.fc2.to(x), _wide(mlp.b2))


def _close(a: Tensor, b: object) -> bool:
    if not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    return bool((a - b).abs().max() <= _TOLERANCE * b.abs().max())
