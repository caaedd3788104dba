"""Window attention: every token attends to the tokens of its window (DaViT, arXiv 2204.03645, section 3.2)."""

from .api import window_attention

__all__ = ["window_attention"]
