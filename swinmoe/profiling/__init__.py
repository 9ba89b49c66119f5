"""What a layer, an exchange or a model costs, and where the time goes."""

from swinmoe.profiling.clock import Timing, median_interval, take_turns

__all__ = ["Timing", "median_interval", "take_turns"]
