"""The block library: operators as modules, shared by all families."""

from .bi_level_routing import BiLevelRoutingAttention, RegionRouter, RoutingRecord, record_routing
from .channel_group import ChannelGroupAttention
from .channels_last import DepthwiseConv, DepthwiseConv2d, MapLinear, MapNorm, MapNorm2d, PointwiseConv2d
from .connectivity import ConnectivityPredictor
from .global_attention import GlobalAttention
from .halo import HaloAttention, resize_rel_table
from .large_kernel import LargeKernelAttention, LargeKernelGate
from .mlp import DepthwiseMlp, MapMlp
from .neighborhood import NeighborhoodAttention, WholeMapAttention, resize_bias_table
from .reversed_attention import ReversedAttention, at_least_float32
from .sparse_attention import AttentionDetails, SparseAttention, SparsityRecord, record_sparsity
from .window import WindowAttention

__all__ = [
    "AttentionDetails",
    "BiLevelRoutingAttention",
    "ChannelGroupAttention",
    "ConnectivityPredictor",
    "DepthwiseConv",
    "DepthwiseConv2d",
    "DepthwiseMlp",
    "GlobalAttention",
    "HaloAttention",
    "LargeKernelAttention",
    "LargeKernelGate",
    "MapLinear",
    "MapMlp",
    "MapNorm",
    "MapNorm2d",
    "NeighborhoodAttention",
    "PointwiseConv2d",
    "RegionRouter",
    "ReversedAttention",
    "RoutingRecord",
    "SparseAttention",
    "SparsityRecord",
    "WholeMapAttention",
    "WindowAttention",
    "at_least_float32",
    "record_routing",
    "record_sparsity",
    "resize_bias_table",
    "resize_rel_table",
]
