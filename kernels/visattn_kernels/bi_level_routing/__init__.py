"""Bi-level routing attention (BiFormer, arXiv 2303.08810): region routing, then attention to the routed regions."""

from .api import POOL_MODES, bi_level_routing_attention, pool_regions, region_descriptors, region_routing, topk_routing

__all__ = [
    "POOL_MODES",
    "bi_level_routing_attention",
    "pool_regions",
    "region_descriptors",
    "region_routing",
    "topk_routing",
]
