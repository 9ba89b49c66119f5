"""Swin Transformers, dense and sparse: pure modules that know nothing of processes."""

from swinmoe.models.build import build_model, create_model
from swinmoe.models.swin import SwinOutput, SwinTransformer

__all__ = ["SwinOutput", "SwinTransformer", "build_model", "create_model"]
