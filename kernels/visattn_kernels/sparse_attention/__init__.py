"""Sparse attention: every query attends to keys that are given to it, per head (Sparsifiner, arXiv 2303.13755)."""

from .api import sparse_attention

__all__ = ["sparse_attention"]
