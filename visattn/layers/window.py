"""Window attention as a module: full attention inside non-overlapping windows of a channels-last map."""

from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from visattn_kernels import split_packed, window_attention
from visattn_kernels.backend import any_size

from .channels_last import MapLinear

register_notrace_function(split_packed)
register_notrace_function(window_attention)


@register_notrace_function
def outside_tokens(
    x: Tensor, bias: Tensor | None, num_heads: int, window_size: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """Key and value of the tokens that a map is padded with, for maps that the windows do not divide.

    Args:
        x: Map (B, H, W, C).
        bias: Bias (3 * C,) of its projection to queries, keys and values; without it these tokens are zero.
        num_heads: Heads.
        window_size: Tokens per window and axis.

    Returns:
        Key and value (num_heads, C / num_heads); None, None where they are zero or where there are none. A graph that
        is exported for maps of any size always has them.
    """
    H, W = x.shape[1], x.shape[2]
    if bias is None or not (any_size([H, W]) or H % window_size[0] > 0 or W % window_size[1] > 0):
        return None, None
    # A view of a parameter claims to require gradients under no_grad, which module hooks trip over; a copy not.
    pads = bias.clone().reshape(3, num_heads, -1)
    return pads[1], pads[2]


class WindowAttention(nn.Module):
    """Multi-head attention of every token to the tokens of its window (DaViT, arXiv 2204.03645, section 3.2).

    There is no shift, no position table and no mask. A map that the windows do not divide is padded with zeros at the
    bottom and right; these tokens take part, and since the zeros enter before the projection, their keys and values are
    its bias. They are never projected here, so the padding costs no more than its attention.

    Args:
        dim: Input and output width.
        num_heads: Attention heads; must divide `dim`.
        window_size: Tokens per window, one number or one per axis. No weight depends on it.
        qkv_bias: Bias in the projection to queries, keys and values.

    Shape:
        (B, H, W, dim) -> (B, H, W, dim)

    Raises:
        ValueError: Settings that do not fit together; the message names the argument.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | tuple[int, int] = 7,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        size = (window_size, window_size) if isinstance(window_size, int) else tuple(window_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"window_size={window_size} must be at least 1, one number or one per axis")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.window_size = (size[0], size[1])
        self.qkv = MapLinear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = MapLinear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        heads = self.num_heads
        q, k, v = split_packed(self.qkv(x).reshape(B, H, W, 3 * heads, C // heads), [heads, heads, heads], dim=-2)
        pads = outside_tokens(x, self.qkv.bias, heads, self.window_size)
        out = window_attention(q, k, v, self.window_size, pads[0], pads[1])
        return self.proj(out.reshape(B, H, W, C))
