"""The block library: operators as modules, shared by all families."""

from .bi_level_routing import BiLevelRoutingAttention, RegionRouter, RoutingRecord, record_routing
from .global_attention import GlobalAttention
from .halo import HaloAttention, resize_rel_table
from .large_kernel import LargeKernelAttention, LargeKernelGate
from .mlp import DepthwiseMlp

__all__ = [
    "BiLevelRoutingAttention",
    "DepthwiseMlp",
    "GlobalAttention",
    "HaloAttention",
    "LargeKernelAttention",
    "LargeKernelGate",
    "RegionRouter",
    "RoutingRecord",
    "record_routing",
    "resize_rel_table",
]
