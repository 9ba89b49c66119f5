"""Tokens -> Routing: scores, noise, the choice of k experts, and the gates.

Shapes: T tokens, D width, E experts (global), K choices, P projection width.
Everything runs in float32 or wider, under autocast and TensorFloat-32 too: scores of 8 or 11 bits are too coarse to
compare experts with.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinmoe import native as kernels
from swinmoe.config.moe import MoEConfig
from swinmoe.moe.precision import autocast_dtype, rounds_products, without_autocast
from swinmoe.moe.registry import register_router
from swinmoe.moe.types import Routing
from swinmoe.randomness import generator

Device = torch.device | str | None


def _softmax(logits: Tensor) -> Tensor:
    """Over the last axis. On a CPU that is not vectorised for short rows, where along the columns it is."""
    if logits.shape[-1] < 16 and _eager_on_cpu(logits):
        return logits.t().softmax(0).t()
    return logits.softmax(-1)


def _eager_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class Router(nn.Module):
    """What all routers share: noise, choice, gates. A router of your own overrides `score`.

    Args:
        cfg: the layer's configuration.
        dim: D.
        name: the layer's name, from which initial weights are seeded.
        seed: the model's seed.
        init_std: standard deviation of initial matrices.
        device, dtype: of the parameters.
    """

    expert_bias: Tensor | None
    native: bool = True
    """Whether our kernel in C++ may join the gradients of tokens: float32 on a CPU."""

    def __init__(
        self,
        cfg: MoEConfig,
        dim: int,
        *,
        name: str,
        seed: int,
        init_std: float,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg.router
        self.num_experts = cfg.num_experts
        self.top_k = cfg.top_k
        self.name, self.seed, self.init_std = name, seed, init_std
        # Counted in small steps of one rate, so float32 whatever the weights are.
        bias = torch.zeros(cfg.num_experts, device=device) if cfg.router.bias_update_rate > 0 else None
        self.register_buffer("expert_bias", bias)

    def score(self, x: Tensor) -> Tensor:
        """Logits (T, E) of tokens (T, D), which come in the gate's dtype."""
        raise NotImplementedError

    def score_and_pass(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`score`, and the tokens once more, as `Routing.passed` has them, or None: our kernel may be taken."""
        return self.score(x), None

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Routing:
        """Route tokens.

        Args:
            x: (T, D).
            noise: (T, E) added to the logits (V-MoE, Riquelme et al. 2021, §2), or None.
        """
        passed = None
        with without_autocast(x) if self.cfg.fp32 else nullcontext():
            wide = torch.promote_types(x.dtype, torch.float32) if self.cfg.fp32 else x.dtype
            if self.cfg.fp32 and rounds_products(x):
                # TensorFloat-32 has no more bits than float16, and its switch is the whole process's: go round it.
                logits = self.score(x.double()).to(wide)
            elif self.native and x.dtype == wide and autocast_dtype(x) is None:
                logits, passed = self.score_and_pass(x)
            else:
                logits = self.score(x.to(wide))
            noisy = logits if noise is None else logits + noise.to(logits.dtype)
            probs = _softmax(noisy) if self.cfg.score == "softmax" else noisy.sigmoid()
            # The bias enters the choice and never the gate (Wang et al. 2024, eq. 3). Without it logits decide: they
            # order experts as probabilities do, and cannot tie by saturation.
            ranking = noisy if self.expert_bias is None else probs + self.expert_bias.to(probs.dtype)
            ranking = ranking.detach()
            if self.top_k == 1:  # the same choice for a fraction of a sort
                expert_ids = ranking.max(-1, keepdim=True).indices
            else:
                expert_ids = ranking.topk(self.top_k, dim=-1).indices
            gates = probs.gather(1, expert_ids)
            if (
                self.cfg.normalize_gates and self.top_k > 1
            ):  # one gate over itself would be 1, and teach the router nothing
                gates = gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).eps)
        std = 0.0 if noise is None else self.cfg.noise / self.num_experts
        return Routing(expert_ids, gates, logits, noisy, probs, std, passed, None if passed is None else x)

    @torch.no_grad()
    def update_bias(self, routed: Tensor) -> None:
        """Move the bias by the update rate towards balance (Wang et al. 2024, algorithm 1); nothing where it is off.

        Args:
            routed: (E,) choices per expert before drops, summed over the global batch of one optimiser step.
        """
        if self.expert_bias is not None:
            load = routed.to(self.expert_bias)
            self.expert_bias += self.cfg.bias_update_rate * torch.sign(load.mean() - load)

    def _draw(self, parameter: Tensor, what: str, std: float) -> None:
        """Truncated normal values that depend on (seed, layer, parameter) only, whatever the device and dtype."""
        if not parameter.is_meta:
            values = torch.empty(parameter.shape, dtype=torch.float32)
            nn.init.trunc_normal_(values, std=std, generator=generator(self.seed, f"{self.name}.router.{what}"))
            with torch.no_grad():
                parameter.copy_(values)


@register_router("linear")
class LinearRouter(Router):
    """logits = W x (Shazeer et al. 2017, without its own noise)."""

    def __init__(
        self, cfg: MoEConfig, dim: int, *, device: Device = None, dtype: torch.dtype | None = None, **kw: Any
    ) -> None:
        super().__init__(cfg, dim, device=device, dtype=dtype, **kw)
        self.weight = nn.Parameter(torch.empty(cfg.num_experts, dim, device=device, dtype=dtype))
        self._draw(self.weight, "weight", self.init_std)

    def score(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, E)."""
        weight = self.weight.to(x.dtype)
        if _eager_on_cpu(x) and autocast_dtype(x) is None:  # what is kept for the backward pass is as it was multiplied
            logits: Tensor = _Logits.apply(x, weight)
            return logits
        return F.linear(x, weight)

    def score_and_pass(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(T, D) -> (T, E) and (T, D)."""
        weight = self.weight.to(x.dtype)
        own = getattr(self.score, "__func__", None) is not _SCORE  # of a class or an object of one's own
        wanted = x.requires_grad and torch.is_grad_enabled()  # or `passed` alone would ask for gradients
        if own or not wanted or not _eager_on_cpu(x) or not kernels.can_walk(x):
            return super().score_and_pass(x)
        logits, passed = _LogitsAndTokens.apply(x, weight)
        return logits, passed


_SCORE = LinearRouter.score


class _Logits(torch.autograd.Function):
    """x Wᵀ. For so few columns the CPU's product takes half the time if W lies transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t().contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return grad @ weight if needs_x else None, grad.t() @ x if needs_weight else None


class _LogitsAndTokens(torch.autograd.Function):
    """x Wᵀ, and x. Of the gradients of both that of x is made in one walk; autograd would write that of the product,
    and walk over both to add them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return x @ weight.t().contiguous(), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        if grad is None:
            return passed, None
        grad_weight = grad.t() @ x if needs_weight else None
        if not needs_x:
            return None, grad_weight
        if passed is None:
            return grad @ weight, grad_weight
        # Our kernel has no derivative of its own.
        if torch.is_grad_enabled() or not kernels.can_walk(grad, passed, weight.detach()):
            return passed + grad @ weight, grad_weight
        return kernels.add_product(passed, grad, weight), grad_weight


@register_router("cosine")
class CosineRouter(Router):
    """Similarity in a small space (Chi et al. 2022), as in Swin-MoE: cos(P x, m_e)·exp(min(temperature, ln 100)).

    `temperature` is the logarithm of the scale; `sim_matrix` (P, E) holds one direction m_e per expert.
    """

    def __init__(
        self, cfg: MoEConfig, dim: int, *, device: Device = None, dtype: torch.dtype | None = None, **kw: Any
    ) -> None:
        super().__init__(cfg, dim, device=device, dtype=dtype, **kw)
        proj_dim = cfg.router.proj_dim
        place = device or torch.get_default_device()
        self.projector = nn.utils.skip_init(nn.Linear, dim, proj_dim, device=place, dtype=dtype)
        self.sim_matrix = nn.Parameter(torch.empty(proj_dim, cfg.num_experts, device=device, dtype=dtype))
        self.temperature = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self._draw(self.projector.weight, "projector.weight", self.init_std)
        self._draw(self.sim_matrix, "sim_matrix", 0.01)
        nn.init.zeros_(self.projector.bias)
        nn.init.constant_(self.temperature, -math.log(cfg.router.init_temperature))

    def score(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, E)."""
        projected = F.linear(x, self.projector.weight.to(x.dtype), self.projector.bias.to(x.dtype))
        cosine = F.normalize(projected, dim=1) @ F.normalize(self.sim_matrix.to(x.dtype), dim=0)
        return cosine * self.temperature.to(x.dtype).clamp(max=math.log(100)).exp()
