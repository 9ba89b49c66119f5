"""Kernels of our own in C++, for CPUs, each an operator of torch.

They are single precision alone and are compiled where they run. Experts take theirs where there is a compiler;
attention and dense MLPs where they are told to. Those of attention and GELU have backward passes that autograd knows;
that of experts is a pair, for a caller who knows where gradients belong.
"""

from swinmoe.native.attention import window_attention
from swinmoe.native.build import compilers, kernels
from swinmoe.native.experts import expert_mlp_backward, expert_mlp_forward, why_no_experts
from swinmoe.native.gelu import biased_gelu

__all__ = [
    "biased_gelu",
    "compilers",
    "expert_mlp_backward",
    "expert_mlp_forward",
    "kernels",
    "why_no_experts",
    "window_attention",
]
