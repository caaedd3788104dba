"""The families. Importing this package registers every model with timm."""

from . import biformer, halonet, van

__all__ = ["biformer", "halonet", "van"]
