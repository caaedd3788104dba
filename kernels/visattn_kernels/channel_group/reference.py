"""Plain torch channel-group attention: the specification of the operator.

Any device, any floating-point dtype, differentiable to any order, scriptable, exportable.
"""

import torch
from torch import Tensor


def to_groups(x: Tensor) -> Tensor:
    """Map (B, H, W, groups, dim) to (B * groups, H * W, dim)."""
    B, H, W, groups, dim = x.shape
    return x.reshape(B, H * W, groups, dim).transpose(1, 2).reshape(B * groups, H * W, dim)


def channel_group_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Reference of :func:`visattn_kernels.channel_group_attention`; same arguments."""
    B, H, W, groups, dim = q.shape
    q, k, v = to_groups(q), to_groups(k), to_groups(v)
    # The product sums over all tokens: scaled as it is made, it stays in the range of half precision.
    logits = torch.baddbmm(q.new_zeros(1), q.transpose(1, 2), k, beta=0, alpha=scale)
    out = v @ logits.softmax(dim=-1).transpose(1, 2)
    return out.reshape(B, groups, H * W, dim).transpose(1, 2).reshape(B, H, W, groups, dim)
