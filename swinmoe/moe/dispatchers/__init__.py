"""Layouts in which rows meet experts: `ragged` (default) and `padded`, equal in their numbers."""

from swinmoe.moe.dispatchers.base import Dispatcher
from swinmoe.moe.dispatchers.padded import PaddedDispatcher
from swinmoe.moe.dispatchers.ragged import RaggedDispatcher

__all__ = ["Dispatcher", "PaddedDispatcher", "RaggedDispatcher"]
