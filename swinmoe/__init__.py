"""swinmoe: Mixture-of-Experts scaling for vision."""

from swinmoe.version import __version__

__all__ = ["__version__"]
