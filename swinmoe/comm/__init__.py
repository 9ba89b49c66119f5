"""Differentiable collectives: tensors and a group go in, tensors come out; nothing here knows of models."""

from swinmoe.comm.all_to_all import Group, Pending, all_to_all_rows, start, wait
from swinmoe.comm.gather import all_gather_rows, gather_into
from swinmoe.comm.gather_sum import all_gather_sum, sum_onto_owners
from swinmoe.comm.journey import Journey, departure_order, direct, two_stages
from swinmoe.comm.reduce import all_reduce_max, all_reduce_min, all_reduce_sum
from swinmoe.comm.regroup import Regrouping, fold, regroup, take
from swinmoe.comm.traffic import Message, listen

__all__ = [
    "Group",
    "Journey",
    "Message",
    "Pending",
    "Regrouping",
    "all_gather_rows",
    "all_gather_sum",
    "all_reduce_max",
    "all_reduce_min",
    "all_reduce_sum",
    "all_to_all_rows",
    "departure_order",
    "direct",
    "fold",
    "gather_into",
    "listen",
    "regroup",
    "start",
    "sum_onto_owners",
    "take",
    "two_stages",
    "wait",
]
