"""Differentiable collectives: tensors and a group go in, tensors come out; nothing here knows of models."""

from swinmoe.comm.all_to_all import Pending, all_to_all_rows, start, wait
from swinmoe.comm.gather import all_gather_rows
from swinmoe.comm.reduce import all_reduce_sum

__all__ = ["Pending", "all_gather_rows", "all_reduce_sum", "all_to_all_rows", "start", "wait"]
