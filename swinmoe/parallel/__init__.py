"""Where models meet processes: the mesh, experts spread over it, and gradients that add up to one process's."""

from swinmoe.parallel.clip import clip_grad_norm
from swinmoe.parallel.cut import Cut, cut_of, is_cut, join_rows, local_part
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
from swinmoe.parallel.fsdp import gathered_units, shard_dense
from swinmoe.parallel.mesh import Mesh, make_mesh
from swinmoe.parallel.offload import saved_on_host
from swinmoe.parallel.optimizer import SplitOptimizer, holders_of, make_adamw

__all__ = [
    "Cut",
    "Mesh",
    "SplitOptimizer",
    "apply_expert_parallel",
    "clip_grad_norm",
    "cut_of",
    "expert_parameter_names",
    "gather_full",
    "gathered_units",
    "global_min",
    "global_sum",
    "holders_of",
    "is_cut",
    "is_expert_parameter",
    "join_rows",
    "local_part",
    "make_adamw",
    "make_mesh",
    "no_sync",
    "saved_on_host",
    "shard_dense",
    "sync_expert_gradients",
    "take_local",
    "unwrap",
    "use_exchange",
    "wrap_data_parallel",
]
