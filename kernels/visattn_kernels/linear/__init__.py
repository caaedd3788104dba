"""Linear layers of maps with little work beside the matrix products: casts, gradients and sums in one step."""

from .api import linear

__all__ = ["linear"]
