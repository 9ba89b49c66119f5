"""Kernels of our own in C++, for CPUs.

They are single precision alone and are compiled where they run. Experts, and what carries rows to them, take theirs
where there is a compiler; attention and dense MLPs where they are told to. Those of attention and GELU are operators of
torch with backward passes that autograd knows; those of experts a pair of operators, for a caller who knows where
gradients belong; those of `dispatch` functions of `moe`'s own operators.
"""

from swinmoe.native.attention import window_attention
from swinmoe.native.build import compiler, kernels, no_compiler, why_no_kernels
from swinmoe.native.dispatch import (
    add_product,
    can_walk,
    give_rows,
    line_up,
    sum_choices,
    sum_choices_backward,
    take_rows,
)
from swinmoe.native.experts import expert_mlp_backward, expert_mlp_forward
from swinmoe.native.gelu import biased_gelu
from swinmoe.native.huge_pages import use_huge_pages

__all__ = [
    "add_product",
    "biased_gelu",
    "can_walk",
    "compiler",
    "expert_mlp_backward",
    "expert_mlp_forward",
    "give_rows",
    "kernels",
    "line_up",
    "no_compiler",
    "sum_choices",
    "sum_choices_backward",
    "take_rows",
    "use_huge_pages",
    "why_no_kernels",
    "window_attention",
]
