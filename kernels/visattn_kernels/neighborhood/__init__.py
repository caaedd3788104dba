"""Neighborhood attention in one to three dimensions (NAT, arXiv 2204.07143; DiNAT, 2209.15001; GNA, 2504.16922)."""

from .api import neighborhood_attention
from .natten import merge_attentions, na1d, na2d, na3d

__all__ = ["merge_attentions", "na1d", "na2d", "na3d", "neighborhood_attention"]
