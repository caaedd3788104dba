"""The families. Importing this package registers every model with timm."""

from . import biformer

__all__ = ["biformer"]
