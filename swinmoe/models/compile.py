"""`torch.compile`, block by block.

A Swin's blocks differ from each other by stage and by shift only, and weights are inputs of a graph: compiled one by
one they share one graph for each stage and shift, where a whole model compiled at once is as many times the work as it
has blocks. Names of parameters stay what they are, and copies of a model (a moving average) run as they did before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch._dynamo as dynamo
from torch import nn

from swinmoe.errors import BackendUnavailableError
from swinmoe.models.block import SwinBlock
from swinmoe.models.kernels import use_native_kernels
from swinmoe.moe import MoEMlp
from swinmoe.moe.execution import LocalExecution
from swinmoe.native import compiler, no_compiler

GRAPHS = 64
"""Graphs that one block's code may have: stages times shifts, in training and evaluation, for several image sizes."""


@dataclass(frozen=True)
class Compiled:
    """Module names: what became one graph each, and what could not, and why."""

    whole: tuple[str, ...]
    """Blocks."""
    attention_only: dict[str, str]
    """Blocks of which the attention was compiled -> why not the rest."""
    no_kernels: str | None = None
    """Why the graphs hold none of our kernels (`swinmoe.native`); None if they do, where the numbers allow."""

    def __str__(self) -> str:
        told = f"compiles {len(self.whole)} blocks"
        if self.attention_only:
            reasons = "; ".join(sorted(set(self.attention_only.values())))
            told += f", and the attention of {len(self.attention_only)} more ({reasons})"
        return told if self.no_kernels is None else f"{told}, without our kernels ({self.no_kernels})"


def compile_blocks(
    model: nn.Module, *, backend: str | Callable[..., Any] = "inductor", options: dict[str, Any] | None = None
) -> Compiled:
    """Compile every Swin block of `model`, in place; nothing happens until the blocks are called.

    A block with experts is one graph where its layout is static: the dispatchers `padded` and `gshard`, with a fixed
    capacity, on one process. Of other blocks with experts the attention is compiled and the rest runs as before: sizes
    that depend on the routing would break the graph. Recomputed activations are compiled inside their regions. On a CPU
    graphs hold our kernels as operators (`use_native_kernels`), which are compiled now, where that can be done.

    Args:
        model: after experts were spread, before it is wrapped for data parallelism.
        backend, options: of `torch.compile`.

    Raises:
        BackendUnavailableError: inductor makes C++ for a CPU, and there is no compiler for it.
    """
    on_cpu = any(parameter.device.type == "cpu" for parameter in model.parameters())
    if backend == "inductor" and on_cpu and compiler() is None:
        raise BackendUnavailableError(
            f"torch.compile needs a C++ compiler to compile for a CPU, and {no_compiler()}; install one, "
            "name yours in CXX, or do not compile (train.compile=false)"
        )
    no_kernels = None
    try:
        use_native_kernels(model, experts=False)
    except BackendUnavailableError as error:
        no_kernels = str(error)
    how: dict[str, Any] = {"backend": backend, "options": options, "dynamic": False, "fullgraph": True}
    # All blocks are one piece of code to dynamo, which stops at 8 graphs of it.
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, GRAPHS)
    whole: list[str] = []
    parts: dict[str, str] = {}
    for name, block in model.named_modules():
        if not isinstance(block, SwinBlock):
            continue
        reason = _changes_size(block.mlp) if isinstance(block.mlp, MoEMlp) else None
        if reason is None:
            block.compile(**how)
            whole.append(name)
        else:
            block.attn.compile(**how)
            parts[name] = reason
    return Compiled(tuple(whole), parts, no_kernels if on_cpu else None)


def _changes_size(layer: MoEMlp) -> str | None:
    """Why this layer is no one graph; None if it is."""
    if not isinstance(layer.execution, LocalExecution):
        return "its experts are spread over processes"
    if layer.cfg.dispatcher not in ("padded", "gshard"):
        return f"dispatcher={layer.cfg.dispatcher}; padded has static shapes"
    policies = {layer.cfg.capacity.train.kind, layer.cfg.capacity.eval.kind}
    if policies != {"fixed"}:
        return f"capacity {' and '.join(sorted(policies))}; only kind=fixed is known in advance"
    return None
