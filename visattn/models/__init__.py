"""The families. Importing this package registers every model with timm."""

from . import biformer, dual_attention, halonet, van

__all__ = ["biformer", "dual_attention", "halonet", "van"]
