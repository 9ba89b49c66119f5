"""Training as one process does it on the whole batch, with oracles for expert layers: what a mesh has to equal.

Shapes: R ranks (routing groups), b images of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swinmoe.config import RunConfig
from swinmoe.data import Batch
from swinmoe.models import SwinTransformer, build_model
from swinmoe.objectives import Classification
from swinmoe.randomness import generator
from swinmoe.train.optim import make_optimizer, set_rate
from swinmoe.verify.oracle import install, set_groups

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """What one optimiser step amounted to."""

    loss: float
    norm: float
    """Of all gradients, before clipping."""
    gradients: Tensors
    """Before clipping, by parameter name."""
    routed: dict[str, list[int]]
    kept: dict[str, list[int]]


def stirred(run: RunConfig, device: torch.device) -> SwinTransformer:
    """The model of `run` with every trainable weight moved: initial biases and residual norms are zero, gates flat,
    and gradients that vanish prove nothing. The values depend on the run's seed and parameter names only."""
    dtype = torch.float64 if run.train.precision == "fp64" else torch.float32
    model = build_model(run.model, seed=run.seed, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator("verify", run.seed, name), dtype=torch.float64)
                # Matrices as for inputs of unit variance, vectors a little.
                scale = 0.1 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
                parameter.add_(scale * noise)
    return model.to(device)


class OneProcess:
    """The reference: no mesh, no dispatch, no DDP; gradients summed by autograd over everything at once."""

    def __init__(self, run: RunConfig, model: SwinTransformer) -> None:
        self.run = run
        self.model = model
        install(model)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.objective = Classification(label_smoothing=run.train.label_smoothing)
        self.optimizer = make_optimizer(model, run.optim)
        self.average: Tensors = {}

    def step(self, number: int, batches: Sequence[Batch], shares: Sequence[Sequence[int]], rate: float) -> Step:
        """Optimiser step `number`, from 0, on all ranks' images; `shares[m][r]` of micro-batch m are rank r's."""
        run = self.run
        self.model.train()
        self.optimizer.zero_grad()
        total = 0.0
        routed: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            set_groups(self.model, shares[micro], (run.seed, "step", number, micro))
            result = self.objective(self.model, batch)
            loss = result.loss_sum / run.train.batch_size + result.aux_loss / run.train.accumulation
            loss.backward()
            total += float(loss.detach())
            for name, stats in result.routing.items():
                routed[name] = routed.get(name, 0) + stats.routed
                kept[name] = kept.get(name, 0) + stats.kept
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in self.trained.items()
        }
        norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
        limit = run.optim.clip_grad_norm
        factor = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        for name, parameter in self.trained.items():
            parameter.grad = gradients[name] * factor
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self._follow(routed)
        return Step(total, norm, gradients, _numbers(routed), _numbers(kept))

    @torch.no_grad()
    def _follow(self, routed: Tensors) -> None:
        """What moves after the weights: loss-free balance, and the average of the weights."""
        for name, layer in self.model.moe_layers().items():
            rate, bias = layer.cfg.router.bias_update_rate, layer.router.expert_bias
            if bias is not None:
                load = routed[name].to(bias)
                bias += rate * torch.sign(load.mean() - load)
        decay = self.run.train.ema_decay
        if decay is not None:
            for name, parameter in self.trained.items():
                before = self.average.get(name)
                new = parameter.detach()
                self.average[name] = new.clone() if before is None else decay * before + (1 - decay) * new


def _numbers(counts: Tensors) -> dict[str, list[int]]:
    return {name: count.tolist() for name, count in counts.items()}
