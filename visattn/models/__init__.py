"""The families. Importing this package registers every model with timm."""

from . import biformer, halonet

__all__ = ["biformer", "halonet"]
