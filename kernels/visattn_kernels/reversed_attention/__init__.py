"""Reversed attention (DependencyViT, arXiv 2304.03282): every token sends its value to the tokens it attends to."""

from .api import reversed_attention, reversed_attention_mask

__all__ = ["reversed_attention", "reversed_attention_mask"]
