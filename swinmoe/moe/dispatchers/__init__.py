"""Ways for tokens to meet experts, equal in their numbers: `ragged` (default), `padded` and `gshard`."""

from swinmoe.moe.dispatchers.base import Dispatcher
from swinmoe.moe.dispatchers.gshard import GShardDispatcher
from swinmoe.moe.dispatchers.padded import PaddedDispatcher
from swinmoe.moe.dispatchers.ragged import RaggedDispatcher

__all__ = ["Dispatcher", "GShardDispatcher", "PaddedDispatcher", "RaggedDispatcher"]
