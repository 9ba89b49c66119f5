"""MoEMlp: a sparse layer that stands where an MLP stood.

Shapes: T tokens on this rank, D width, E experts counted globally, K choices, N kept rows.

    x (T, D) -> router -> Routing -> queues cut at capacity -> DispatchPlan -> expert rows -> experts -> (T, D)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from swinmoe.config.moe import MoEConfig
from swinmoe.errors import RoutingError
from swinmoe.moe import dispatch, dispatchers, experts, losses, phases, routers
from swinmoe.moe.capacity import allowed_drops, capacity
from swinmoe.moe.dispatchers import Dispatcher, choose
from swinmoe.moe.execution import LocalExecution
from swinmoe.moe.registry import DISPATCHERS, EXPERTS, ROUTERS
from swinmoe.moe.routers import Router
from swinmoe.moe.types import DispatchPlan, ExpertExecution, ExpertRows, Queues, Route, Routing, RoutingStats
from swinmoe.randomness import derive_seed

_BUILT_IN = (dispatchers, experts, routers)  # imported for the names they register


class MoEMlp(nn.Module):
    """Top-k gated experts in place of an MLP: y = Σ_k gate_k(x)·expert_k(x) (Shazeer et al. 2017), plus statistics.

    Args:
        cfg: what the layer is; None = `MoEConfig()`.
        dim: D, width in and out.
        hidden_dim: hidden width of the dense MLP that the layer replaces; an expert's is `hidden_ratio` times that.
        name: the layer's name in its model. Initial weights depend on (seed, name, expert) only.
        seed: the model's seed.
        init_std: standard deviation of initial matrices.
        device, dtype: of the parameters.

    Raises:
        ConfigError: an unknown router, expert or dispatcher.

    `execution` says how rows meet experts. It is local unless expert parallelism replaces it; it owns no parameters.
    """

    native: bool = True
    """Whether rows may be carried by our kernels in C++: float32 on a CPU. Experts and router have switches."""
    _noise_seed: int
    _generator: torch.Generator

    def __init__(
        self,
        cfg: MoEConfig | None = None,
        *,
        dim: int,
        hidden_dim: int,
        name: str = "moe",
        seed: int = 0,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        cfg = cfg or MoEConfig()
        self.cfg = cfg = replace(cfg, capacity=cfg.capacity.of(name))
        self.dim, self.hidden_dim, self.name = dim, hidden_dim, name
        self.num_experts, self.top_k = cfg.num_experts, cfg.top_k
        common = {"seed": seed, "init_std": init_std, "device": device, "dtype": dtype}
        self.router: Router = ROUTERS.get(cfg.router.type)(cfg, dim, name=name, **common)
        make_experts = EXPERTS.get(cfg.experts.type)
        hidden = max(1, round((cfg.experts.hidden_ratio or 1.0) * hidden_dim))
        self.experts = make_experts(
            cfg.experts, num_experts=cfg.num_experts, dim=dim, hidden=hidden, name=name, **common
        )
        self.shared = None
        if cfg.shared_expert_ratio > 0:
            hidden = max(1, round(cfg.shared_expert_ratio * hidden_dim))
            self.shared = make_experts(
                cfg.experts, num_experts=1, dim=dim, hidden=hidden, name=f"{name}.shared", **common
            )
        self.dispatcher: Dispatcher = DISPATCHERS.get(cfg.dispatcher)()
        self.execution: ExpertExecution = LocalExecution()
        self.seed_noise(derive_seed(seed, name, "noise"))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, RoutingStats]:
        """Route each token to its experts.

        Args:
            x: (*, D); all leading axes count as tokens. No tokens at all is legal.
            noise: (T, E) for the gate's logits; None = drawn here, in training, where the config asks for noise.

        Returns:
            y: (*, D), and what happened on the way.
        """
        if x.shape[-1] != self.dim:
            raise RoutingError(f"{self.name} was given tokens of width {x.shape[-1]}; it was made for dim={self.dim}")
        tokens = x.reshape(-1, self.dim)
        if noise is None:
            noise = self.draw_noise(tokens.shape[0], tokens.device)
        routing, plan, route, stats = self.assign(tokens, noise)
        return self.carry(routing.to_carry(tokens), routing, plan, route).view(x.shape), stats

    def assign(self, tokens: Tensor, noise: Tensor | None) -> tuple[Routing, DispatchPlan, Route, RoutingStats]:
        """Decide who goes where, and everything that ranks tell each other about it; no feature moves.

        Who recomputes activations recomputes `carry` alone, so that decisions and metadata are not made twice.
        """
        outside = phases.current()
        given = phases.border(tokens, outside, "route")
        routing: Routing = self.router(given, noise)
        if routing.passed is not None and routing.passed_from is not given:
            routing = replace(routing, passed=None)
        policy = self.cfg.capacity.train if self.training else self.cfg.capacity.eval
        num_tokens = tokens.shape[0]  # not len(), which makes a number of a symbolic size
        limit = capacity(policy, num_tokens, self.num_experts, self.top_k)
        queues = dispatch.queue(
            routing,
            self.num_experts,
            limit,
            batch_prioritized=self.cfg.router.batch_prioritized,
            allowed=allowed_drops(policy, num_tokens, self.top_k),
            native=self.native,
        )
        slots = self.dispatcher.slots(queues, limit, policy)
        route = self.execution.prepare(queues.counts, slots)
        plan = dispatch.plan(routing, queues, rows=self._num_rows(queues, route), slots=slots, native=self.native)
        stats = self._statistics(routing, queues)
        phases.enter(outside)
        return routing, plan, route, stats

    def carry(self, tokens: Tensor, routing: Routing, plan: DispatchPlan, route: Route) -> Tensor:
        """Take tokens (T, D) to their experts and back, as decided.

        Under `torch.utils.checkpoint`, call it inside `set_checkpoint_early_stop(False)`, as `models.block` does:
        recomputation otherwise ends with the last tensor that the backward pass needs, and may leave an exchange begun
        and not finished, for which other ranks wait.
        """
        outside = phases.current()
        rows = self.dispatcher.scatter(phases.border(tokens, "route", "scatter"), routing, plan)
        rows = ExpertRows(phases.border(rows.rows, "scatter", "exchange_out"), rows.counts)
        function = phases.watched(self.experts.function(self.training))
        out = self.execution.run(rows, route, self.experts.weights(), function)
        y = self.dispatcher.gather(phases.border(out, "exchange_back", "gather"), routing, plan)
        if self.shared is None:
            return phases.border(y, "gather", outside)
        y = phases.border(y, "gather", "experts")
        everyone = tokens.unsqueeze(0)  # all rows go to the one expert: the padded layout without padding
        y = y + self.shared.function(self.training)(everyone, None, self.shared.weights()).squeeze(0)
        return phases.border(y, "experts", outside)

    def _num_rows(self, queues: Queues, route: Route) -> int | None:
        """Kept choices on this rank where the layout depends on them, without asking the device if anyone knows."""
        if route.matrix is None:
            return None
        if queues.kept is None:
            return queues.slot.numel()
        return int(queues.counts.sum()) if route.rows is None else route.rows

    def _statistics(self, routing: Routing, queues: Queues) -> RoutingStats:
        cfg = self.cfg.losses
        distribution = routing.probs
        if self.cfg.router.score == "sigmoid":
            distribution = distribution / distribution.sum(-1, keepdim=True).clamp(
                min=torch.finfo(distribution.dtype).tiny
            )
        names = losses.active_losses(cfg)
        computed: dict[str, Tensor] = {}
        if names:
            noise_std = self.cfg.router.noise / self.num_experts
            sums = losses.batch_sums(names, routing, distribution, noise_std)
            if cfg.batch == "global":
                sums = self.execution.reduce(sums)
            computed = losses.losses_from_sums(names, sums, self.num_experts)
        ids = routing.expert_ids
        return RoutingStats(
            routed=queues.routed,
            kept=queues.counts,
            tokens=torch.full((), ids.shape[0], dtype=torch.int64, device=ids.device),
            entropy_sum=_entropy(distribution.detach()),
            losses={name: loss.detach() for name, loss in computed.items()},
            loss=losses.weighted(cfg, computed, routing.logits),
            expert_ids=ids if queues.kept is None else torch.where(queues.kept, ids, -1),
        )

    def draw_noise(self, num_tokens: int, device: torch.device | str) -> Tensor | None:
        """Gate noise (num_tokens, E) of standard deviation noise/E; None in evaluation or where there is none.

        Drawn from the layer's own generator: dropout and augmentation elsewhere do not change routing.
        """
        if not self.training or self.cfg.router.noise == 0:
            return None
        device = torch.device(device)
        if device.type == "meta":  # no values, and no generator to draw them from
            return torch.empty(num_tokens, self.num_experts, device=device)
        if self._generator.device.type != device.type:
            self._generator = torch.Generator(device=device).manual_seed(self._noise_seed)
        noise = torch.randn(num_tokens, self.num_experts, generator=self._generator, device=device)
        return noise * (self.cfg.router.noise / self.num_experts)

    def seed_noise(self, seed: int) -> None:
        """Restart the noise generator: done at every micro-step, a resumed run draws what it would have drawn."""
        self._noise_seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    def update_bias(self, routed: Tensor) -> None:
        """Loss-free balancing: call once per optimiser step with (E,) choices summed over the global batch.

        Does nothing where `router.bias_update_rate` is 0.
        """
        self.router.update_bias(routed)

    def dispatcher_taken(self) -> tuple[str, str]:
        """The dispatcher in use, for rows of the weights' dtype where they now are, and why `auto` took it; "" where
        the config names it."""
        if self.cfg.dispatcher != "auto":
            return self.cfg.dispatcher, ""
        weight, policy = next(self.parameters()), self.cfg.capacity
        return choose(weight.device, weight.dtype, (policy.train if self.training else policy.eval).kind)

    def extra_repr(self) -> str:
        """Choices, for `print(model)`; of `auto`, what it takes where the weights now are."""
        dispatcher = repr(self.cfg.dispatcher)
        if self.cfg.dispatcher == "auto":
            dispatcher += " -> {!r} ({})".format(*self.dispatcher_taken())
        return f"num_experts={self.num_experts}, top_k={self.top_k}, dispatcher={dispatcher}"


def _entropy(distribution: Tensor) -> Tensor:
    """() float32: −Σ p·ln p over all of (T, E), with 0·ln 0 = 0; `torch.special.entr` takes four times as long."""
    logarithms = distribution.clamp(min=torch.finfo(distribution.dtype).tiny).log_()
    return -(distribution * logarithms).sum(dtype=torch.float32)
