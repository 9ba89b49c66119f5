"""What an expert layer must look like for it to compute, at step 0, what the dense MLP it replaces computes.

Shapes: E experts, K choices per token, F hidden units of the dense MLP, w = hidden_ratio·F of an expert, G parts.

The layer computes y = Σ_k gate_k·expert_k(x) + shared(x). Its experts are cuts of one MLP m = fc2·act(fc1 x + b1) + b2:

- Experts e = vG .. vG + G - 1 form group v, and expert vG + j holds part j of the G parts of m's hidden units
  (G = 1: every expert is a copy). Members of a group have equal scores, so that the K = nG best are whole groups
  ("virtual groups", He et al. 2024), and y = (Σ gates / G)·Σ_j part_j(x), if Σ gates is the same for every token.
- Σ gates = s is a constant where gates are normalised (s = 1; Komatsuzaki et al. 2023) and where softmax gates of all
  experts are summed (K = E). Otherwise it is p_top(x) < 1, which no constant can undo. Then the router starts
  *undecided*: its logits differ by 4e-6 (float64: 1e-12), enough to tell experts apart and spread tokens over them,
  and nothing in the gates, which are 1/E (softmax; s = K/E) or 1/2 (sigmoid; s = K/2). It learns as from any other
  initial value.
- fc2 is multiplied by G/s, and b2, which each of the K visited experts adds, by 1/s.
- A shared expert of ws units takes part in m too: the first ws units are its alone if the experts' parts cover the
  other F - ws, and half its own if they cover all F.

All of it holds for the choices that are kept: what a capacity drops is missing, as in any sparse model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swinmoe.config.moe import MoEConfig
from swinmoe.errors import ConfigError


def undecided(dtype: torch.dtype) -> float:
    """Factor of a router's initial weights: below what a gate's rounding shows, and far above the smallest number.

    A float32 router must be something in float16 too, whose numbers end at 6e-8: all zeros would send every token to
    the same experts.
    """
    return 1e-12 if dtype == torch.float64 else 4e-6


@dataclass(frozen=True)
class ExpertPlan:
    """How the hidden units of one MLP are spread over the experts of a layer."""

    parts: int
    """G, cuts of the MLP that make it whole."""
    gate_sum: float
    """s, sum of a token's gates."""
    undecided: bool
    """The router must start without a preference."""
    first: int = 0
    """First hidden unit that routed experts hold; those before it are the shared expert's alone."""
    shared_share: float = 0.0
    """Of its units and of the bias, the share that the shared expert computes: 1, or 1/2, or 0 without one."""

    @property
    def scale(self) -> float:
        """Factor of fc2 in every expert, G/s."""
        return self.parts / self.gate_sum


def expert_width(cfg: MoEConfig, hidden: int) -> int:
    """w, as `MoEMlp` rounds it, for a dense MLP of `hidden` units."""
    return max(1, round((cfg.experts.hidden_ratio or 1.0) * hidden))


def shared_width(cfg: MoEConfig, hidden: int) -> int:
    """Hidden units of the shared expert; 0 without one."""
    return max(1, round(cfg.shared_expert_ratio * hidden)) if cfg.shared_expert_ratio else 0


def nominal_gate_sum(cfg: MoEConfig) -> tuple[float, bool]:
    """Sum of a token's gates, and whether only an undecided router has it."""
    if cfg.router.normalize_gates and cfg.top_k > 1:  # one gate over itself is not normalised (`moe.routers`)
        return 1.0, False
    if cfg.router.score == "softmax":
        return cfg.top_k / cfg.num_experts, cfg.top_k < cfg.num_experts
    return cfg.top_k / 2, True


def plan_experts(cfg: MoEConfig, hidden: int, *, preserve: bool = True) -> ExpertPlan:
    """How experts of `cfg` are cut from an MLP of `hidden` units.

    Args:
        cfg: the layer.
        hidden: F.
        preserve: refuse what cannot compute the MLP's function; without, choices per token need not make up whole MLPs
            and the router keeps its initial values, so that outputs have the right size on average only.

    Raises:
        ConfigError: experts that are no cuts of the MLP, or (`preserve`) a layer that cannot compute its function.
    """
    gate_sum, undecided = nominal_gate_sum(cfg)
    if preserve and undecided:
        _check_can_be_undecided(cfg)
    found = []
    for first, share in _covers(cfg, hidden):
        parts, rest = divmod(hidden - first, expert_width(cfg, hidden))
        if rest == 0 and parts >= 1:
            found.append((parts, first, share))
    if not found:
        raise ConfigError(_no_cover(cfg, hidden))
    for parts, first, share in found:
        if cfg.num_experts >= parts and (not preserve or cfg.num_experts % parts == cfg.top_k % parts == 0):
            plan = ExpertPlan(parts, gate_sum, preserve and undecided, first, share)
            _check_groups_stay_whole(cfg, plan)
            return plan
    parts = found[0][0]
    raise ConfigError(
        f"moe.experts.hidden_ratio={cfg.experts.hidden_ratio} cuts an MLP into {parts} experts, which must be "
        f"visited together to compute what it did, but moe.num_experts={cfg.num_experts} and moe.top_k={cfg.top_k} are "
        f"not both multiples of {parts}; use e.g. num_experts={max(1, round(cfg.num_experts / parts)) * parts}, "
        f"top_k={max(1, round(cfg.top_k / parts)) * parts}, or preserve=False"
    )


def _check_groups_stay_whole(cfg: MoEConfig, plan: ExpertPlan) -> None:
    if plan.undecided and plan.parts > 1 and cfg.router.bias_update_rate > 0:
        raise ConfigError(
            f"moe.router.bias_update_rate={cfg.router.bias_update_rate} ranks experts by their gates, which an "
            f"undecided router leaves equal, so that the {plan.parts} parts of an MLP would not be chosen together; "
            "use router.normalize_gates=true, bias_update_rate=0, or preserve=False"
        )


def _covers(cfg: MoEConfig, hidden: int) -> list[tuple[int, float]]:
    """(first routed unit, share of the shared expert) of the ways to cover all hidden units."""
    alone = shared_width(cfg, hidden)
    if alone == 0:
        return [(0, 0.0)]
    return [cover for cover in ((alone, 1.0), (0, 0.5)) if alone <= hidden and cover[0] < hidden]


def _no_cover(cfg: MoEConfig, hidden: int) -> str:
    width, alone = expert_width(cfg, hidden), shared_width(cfg, hidden)
    beside = f" beside a shared expert of {alone}" if alone else ""
    rest = f", or of the remaining {hidden - alone}" if 0 < alone < hidden else ""
    return (
        f"experts of {width} hidden units (moe.experts.hidden_ratio={cfg.experts.hidden_ratio}){beside} are no equal "
        f"parts of an MLP of {hidden}; a ratio must give a divisor of {hidden}{rest}, such as 1, 0.5 or 0.25"
        + (", and moe.shared_expert_ratio may be at most 1" if alone > hidden else "")
    )


def _check_can_be_undecided(cfg: MoEConfig) -> None:
    router = cfg.router
    why = (
        f"moe.top_k={cfg.top_k} of {cfg.num_experts} experts with router.score={router.score!r} and gates that are not "
        "normalised: their sum differs from token to token unless the router starts undecided, and "
    )
    way_out = "; use router.normalize_gates=true with top_k of 2 or more, a linear router, or preserve=False"
    if router.type not in ("linear", "cosine"):
        raise ConfigError(f"{why}router.type={router.type!r} is not known to upcycling{way_out}")
    if router.type == "cosine" and router.proj_dim < 2:
        raise ConfigError(f"{why}a cosine router needs router.proj_dim of 2 or more for that{way_out}")
