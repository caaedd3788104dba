"""Halo attention (HaloNet, arXiv 2103.12731): blocks of queries attend to their block and a band around it."""

from .api import halo_attention

__all__ = ["halo_attention"]
