"""Proofs: a mesh against one process."""

from swinmoe.verify.parallel import verify_parallel
from swinmoe.verify.proof import TOLERANCE, ParallelProof

__all__ = ["TOLERANCE", "ParallelProof", "verify_parallel"]
