"""Swin Transformers, dense and sparse: pure modules that know nothing of processes."""

from swinmoe.models.build import build_model, create_model
from swinmoe.models.compile import Compiled, compile_blocks
from swinmoe.models.kernels import leave_native_kernels, use_native_kernels
from swinmoe.models.swin import SwinOutput, SwinTransformer

__all__ = [
    "Compiled",
    "SwinOutput",
    "SwinTransformer",
    "build_model",
    "compile_blocks",
    "create_model",
    "leave_native_kernels",
    "use_native_kernels",
]
