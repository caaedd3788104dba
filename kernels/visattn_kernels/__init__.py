"""Attention operators of visattn as functions: one layout, several backends.

Every operator takes heads-last tensors ``(B, H, W, heads, dim)`` or ``(B, N, heads, dim)``, validates its arguments,
and picks a backend (see :mod:`visattn_kernels.backend`). Importing this package needs torch only; Triton is imported
when a Triton kernel is first used.
"""

from . import flops as _flops  # registers FLOP formulas that torch lacks
from .backend import available_backends, use_backend
from .bi_level_routing import (
    POOL_MODES,
    bi_level_routing_attention,
    pool_regions,
    region_descriptors,
    region_routing,
    topk_routing,
)
from .channel_group import channel_group_attention
from .depthwise_conv import depthwise_conv
from .halo import halo_attention
from .layer_norm import add_layer_norm, layer_norm
from .linear import linear
from .neighborhood import merge_attentions, na1d, na2d, na3d, neighborhood_attention
from .packed import split_packed
from .reversed_attention import reversed_attention, reversed_attention_mask
from .sparse_attention import sparse_attention
from .window import window_attention

__all__ = [
    "POOL_MODES",
    "add_layer_norm",
    "available_backends",
    "bi_level_routing_attention",
    "channel_group_attention",
    "depthwise_conv",
    "halo_attention",
    "layer_norm",
    "linear",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
    "pool_regions",
    "region_descriptors",
    "region_routing",
    "reversed_attention",
    "reversed_attention_mask",
    "sparse_attention",
    "split_packed",
    "topk_routing",
    "use_backend",
    "window_attention",
]

del _flops
