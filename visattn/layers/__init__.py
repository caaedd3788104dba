"""The block library: operators as modules, shared by all families."""

from .bi_level_routing import BiLevelRoutingAttention, RegionRouter, RoutingRecord, record_routing
from .global_attention import GlobalAttention
from .mlp import DepthwiseMlp

__all__ = [
    "BiLevelRoutingAttention",
    "DepthwiseMlp",
    "GlobalAttention",
    "RegionRouter",
    "RoutingRecord",
    "record_routing",
]
