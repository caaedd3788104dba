"""Channel-group attention as a module: channels attend to channels, over all tokens of a channels-last map."""

from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from visattn_kernels import channel_group_attention, split_packed

from .channels_last import MapLinear

register_notrace_function(channel_group_attention)
register_notrace_function(split_packed)


class ChannelGroupAttention(nn.Module):
    """Attention between the channels of a group (DaViT, arXiv 2204.03645, section 3.3).

    Every channel reads the whole map, at a cost linear in its size.

    Args:
        dim: Input and output width.
        num_groups: Groups of channels; must divide `dim`.
        qkv_bias: Bias in the projection to queries, keys and values.
        v2: Florence-2's version (arXiv 2311.06242): the logits are divided by the root of the number of tokens instead
            of channels. The thirds of its projection also have other roles: queries, keys, values, where those of DaViT
            are values, queries, keys.

    Shape:
        (B, H, W, dim) -> (B, H, W, dim)

    Raises:
        ValueError: `num_groups` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_groups: int,
        qkv_bias: bool = True,
        v2: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_groups < 1 or dim % num_groups:
            raise ValueError(f"num_groups={num_groups} must divide dim={dim}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_groups = num_groups
        self.v2 = v2
        self.qkv = MapLinear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = MapLinear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        groups = self.num_groups
        qkv = self.qkv(x).reshape(B, H, W, 3 * groups, C // groups)
        first, second, third = split_packed(qkv, [groups, groups, groups], dim=-2)
        if self.v2:
            out = channel_group_attention(first, second, third, (H * W) ** -0.5)
        else:
            out = channel_group_attention(second, third, first)
        return self.proj(out.reshape(B, H, W, C))
