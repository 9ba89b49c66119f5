"""Kernels of our own in C++, for CPUs, each an operator of torch with a backward pass.

They are single precision alone and are compiled where they run, so a model takes them where it is told to.
"""

from swinmoe.native.attention import window_attention
from swinmoe.native.build import compilers, kernels
from swinmoe.native.gelu import biased_gelu

__all__ = ["biased_gelu", "compilers", "kernels", "window_attention"]
