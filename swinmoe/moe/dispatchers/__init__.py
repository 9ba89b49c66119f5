"""Ways for tokens to meet experts, equal in their numbers: `ragged` (default), `padded`, `tutel`, `gshard`, `auto`."""

from swinmoe.moe.dispatchers.auto import AutoDispatcher, choose
from swinmoe.moe.dispatchers.base import Dispatcher
from swinmoe.moe.dispatchers.gshard import GShardDispatcher
from swinmoe.moe.dispatchers.padded import PaddedDispatcher
from swinmoe.moe.dispatchers.ragged import RaggedDispatcher
from swinmoe.moe.dispatchers.tutel import TutelDispatcher

__all__ = [
    "AutoDispatcher",
    "Dispatcher",
    "GShardDispatcher",
    "PaddedDispatcher",
    "RaggedDispatcher",
    "TutelDispatcher",
    "choose",
]
