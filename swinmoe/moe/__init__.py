"""The sparse house: a top-k gated expert layer, and the parts it is made of."""

from swinmoe.moe.activations import Activation
from swinmoe.moe.capacity import allowed_drops, capacity, require_slots
from swinmoe.moe.dispatch import least_cut
from swinmoe.moe.dispatchers import Dispatcher, PaddedDispatcher, RaggedDispatcher
from swinmoe.moe.execution import LocalExecution
from swinmoe.moe.experts import Experts
from swinmoe.moe.layer import MoEMlp
from swinmoe.moe.registry import register_dispatcher, register_expert, register_router
from swinmoe.moe.routers import Router
from swinmoe.moe.stats import merge, summarise
from swinmoe.moe.types import (
    DispatchPlan,
    ExpertExecution,
    ExpertFn,
    ExpertRows,
    ExpertWeights,
    Route,
    Routing,
    RoutingStats,
)

__all__ = [
    "Activation",
    "DispatchPlan",
    "Dispatcher",
    "ExpertExecution",
    "ExpertFn",
    "ExpertRows",
    "ExpertWeights",
    "Experts",
    "LocalExecution",
    "MoEMlp",
    "PaddedDispatcher",
    "RaggedDispatcher",
    "Route",
    "Router",
    "Routing",
    "RoutingStats",
    "allowed_drops",
    "capacity",
    "least_cut",
    "merge",
    "register_dispatcher",
    "register_expert",
    "register_router",
    "require_slots",
    "summarise",
]
