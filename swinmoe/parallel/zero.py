"""ZeRO stage 1 (Rajbhandari et al. 2020, §5.1) by FairScale's OSS: each rank keeps the moments of some parameters.

After its own share is stepped, every rank broadcasts it: parameters stay whole, and equal to the bit. The only file
that imports fairscale.

What OSS does not do here, and why:
    clipping      its norm counts every rank's experts as the same ones: `parallel.clip` has the right one
    state dicts   they meet as pickles on one rank: `checkpoint` writes what each rank holds
    loss scale    an overflow is seen by the global norm, and no rank steps
What it does, and is to be known: parameters become views of one flat buffer per owner (so they are made contiguous, and
whoever kept their storage would look at the old one); a rank may own nothing, and steps nothing then; tensors are not
divided, so that the largest bounds how even the shares can be.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW, Optimizer

from swinmoe.comm.failure import naming
from swinmoe.comm.traffic import note
from swinmoe.errors import BackendUnavailableError

_WHAT = "ZeRO: sending updated parameters to the ranks that did not step them"


def shard_moments(
    groups: list[dict[str, Any]], group: dist.ProcessGroup, settings: Mapping[str, Any]
) -> tuple[Optimizer, dict[Tensor, int]]:
    """AdamW whose moments are dealt out over `group`, and each parameter's owner, by its number in the group.

    Args:
        groups: as `torch.optim` takes them; the same on all ranks of the group, and so are the parameters' values.
        group: ranks that hold the same parameters.
        settings: of AdamW.

    Raises:
        BackendUnavailableError: FairScale is not installed.
    """
    try:
        from fairscale.optim import OSS
    except ImportError as error:
        raise BackendUnavailableError(
            "parallel.zero=true needs FairScale, which is not installed; install swinmoe[fairscale], or set "
            "parallel.zero=false (parallel.shard_dense needs nothing more than torch)"
        ) from error
    # OSS gives each parameter to whoever has least so far: the largest first makes the shares even.
    ordered = [{**g, "params": sorted(g["params"], key=lambda p: -p.numel())} for g in groups]

    class Sharded(OSS):
        def step(self, closure: None = None) -> None:
            with naming(_WHAT, amid_other_work=True):
                super().step()
            note("broadcast", _WHAT, self.world_size, (self.world_size - 1) * sum(p.nbytes for p in mine))

    with warnings.catch_warnings():
        # FairScale asks torch by a name that torch has put a warning on.
        warnings.filterwarnings("ignore", message=".*_get_global_rank", category=FutureWarning)
        sharded = Sharded(ordered, optim=AdamW, group=group, **settings)
    owner = {p: rank for rank, own in enumerate(sharded.partition_parameters()) for g in own for p in g["params"]}
    mine = [p for p, rank in owner.items() if rank == sharded.rank]
    return sharded, owner
