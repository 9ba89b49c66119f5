"""The experts of a layer: stacked parameters, and the pure function that applies them.

Shapes: E experts (global), e experts held here, D width, F hidden width of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from swinmoe.config.moe import ExpertConfig
from swinmoe.moe.activations import Activation, Gelu, Relu, SwiGlu
from swinmoe.moe.expert_kernel import why_not
from swinmoe.moe.expert_mlp import expert_mlp
from swinmoe.moe.registry import register_expert
from swinmoe.moe.types import ExpertFn, ExpertWeights
from swinmoe.randomness import generator

Device = torch.device | str | None


class Experts(nn.Module):
    """Two-layer MLPs as one stacked weight per matrix, each expert's slice laid out as in `nn.Linear`.

    Experts with another activation override `activation`; experts of another kind override `weights` and `function`.
    Expert parallelism replaces the parameters by a slice of their experts, so nothing here counts on E of them.

    Args:
        cfg: what an expert computes.
        num_experts: E.
        dim: D.
        hidden: F.
        name: the stack's name, from which initial weights are seeded.
        seed: the model's seed.
        init_std: standard deviation of the initial matrices, which are truncated normal within ±2; biases start at 0.
        device, dtype: of the parameters.
    """

    activation: ClassVar[Activation]
    slice_axes: ClassVar[Mapping[str, int]] = {"fc1_weight": 1, "fc1_bias": 1, "fc2_weight": 2, "fc2_bias": 1}
    """Axis along which each parameter is cut where an expert is sliced over ranks: that of the hidden width, and D for
    `fc2_bias`, which every slice adds a part of. Experts that cannot be sliced have an empty one."""
    native: bool = True
    """Whether our kernel in C++ may be taken: on a CPU, in float32, where there is a compiler for it."""
    fc1_bias: Tensor | None
    fc2_bias: Tensor | None

    def __init__(
        self,
        cfg: ExpertConfig,
        *,
        num_experts: int,
        dim: int,
        hidden: int,
        name: str,
        seed: int,
        init_std: float,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dropout = cfg.dropout
        fc1_rows = self.activation.rows_per_hidden * hidden

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

        self.fc1_weight = nn.Parameter(torch.empty(num_experts, fc1_rows, dim, device=device, dtype=dtype))
        self.register_parameter("fc1_bias", zeros(num_experts, fc1_rows) if cfg.fc1_bias else None)
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, dim, hidden, device=device, dtype=dtype))
        self.register_parameter("fc2_bias", None if cfg.fc2_bias == "none" else zeros(num_experts, dim))
        if cfg.fc2_bias == "frozen-zero" and self.fc2_bias is not None:
            self.fc2_bias.requires_grad_(False)
        _draw(self.fc1_weight, init_std, seed, f"{name}.fc1.weight")
        _draw(self.fc2_weight, init_std, seed, f"{name}.fc2.weight")

    def weights(self) -> ExpertWeights:
        """The parameters of the experts held here."""
        return ExpertWeights(self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)

    def function(self, training: bool) -> ExpertFn:
        """What one pass does with rows and weights; holds no parameters."""
        dropout = self.dropout if training else 0.0
        return partial(expert_mlp, activation=self.activation, dropout=dropout, native=self.native)

    def why_no_kernel(self) -> str:
        """Why a float32 pass does not take our kernel in C++ where the weights now are; "" where it does."""
        if type(self).function is not Experts.function:
            return "they compute in a way of their own"
        return why_not(self.weights(), self.activation) if self.native else "they were told not to take it"

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        experts, dim, hidden = self.fc2_weight.shape
        return f"experts={experts}, dim={dim}, hidden={hidden}, dropout={self.dropout}"


@register_expert("gelu")
class GeluExperts(Experts):
    """fc2(GELU(fc1 x)), Swin's MLP."""

    activation = Gelu()


@register_expert("relu")
class ReluExperts(Experts):
    """fc2(max(fc1 x, 0)), Tutel's usual experts."""

    activation = Relu()


@register_expert("swiglu")
class SwiGluExperts(Experts):
    """fc2(value·SiLU(gate)); rows 2i and 2i + 1 of fc1 give value and gate of hidden unit i."""

    activation = SwiGlu()


@torch.no_grad()
def _draw(stack: Tensor, std: float, seed: int, name: str) -> None:
    """Expert e's matrix from its own generator: the same on any rank, device and dtype, for any number of experts."""
    if stack.is_meta:
        return
    for expert, matrix in enumerate(stack):
        values = torch.empty(matrix.shape, dtype=torch.float32)
        matrix.copy_(nn.init.trunc_normal_(values, std=std, generator=generator(seed, name, expert)))
