"""Where models meet processes: the mesh, experts spread over it, and gradients that add up to one process's."""

from swinmoe.parallel.clip import clip_grad_norm
from swinmoe.parallel.data_parallel import (
    global_min,
    global_sum,
    no_sync,
    sync_expert_gradients,
    unwrap,
    wrap_data_parallel,
)
from swinmoe.parallel.expert_parallel import apply_expert_parallel, use_exchange
from swinmoe.parallel.expert_parameter import (
    expert_parameter_names,
    gather_full,
    is_expert_parameter,
    take_local,
)
from swinmoe.parallel.mesh import Mesh, make_mesh

__all__ = [
    "Mesh",
    "apply_expert_parallel",
    "clip_grad_norm",
    "expert_parameter_names",
    "gather_full",
    "global_min",
    "global_sum",
    "is_expert_parameter",
    "make_mesh",
    "no_sync",
    "sync_expert_gradients",
    "take_local",
    "unwrap",
    "use_exchange",
    "wrap_data_parallel",
]
