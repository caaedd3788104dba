"""Full self-attention over a channels-last map, with an optional local positional conv (LePE)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .channels_last import DepthwiseConv, MapLinear

LEPE_SOURCES = ("none", "input", "value")


class GlobalAttention(nn.Module):
    """Multi-head attention of every token of the map to all tokens.

    Args:
        dim: Input and output width.
        num_heads: Attention heads; must divide `dim`.
        qkv_bias: Bias in the projection to queries, keys and values.
        lepe: What the depthwise positional conv reads: ``none``, the module's ``input`` or the ``value``s. Its result
            is added before the output projection.
        lepe_kernel_size: Kernel of that conv; 0 for none.

    Shape:
        (B, H, W, dim) -> (B, H, W, dim)

    Raises:
        ValueError: Settings that do not fit together; the message names the argument.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        lepe: str = "none",
        lepe_kernel_size: int = 5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        if lepe not in LEPE_SOURCES:
            raise ValueError(f"lepe={lepe!r} is not a source; use one of {', '.join(LEPE_SOURCES)}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.lepe_of_value = lepe == "value"
        self.qkv = MapLinear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.lepe = DepthwiseConv(dim, lepe_kernel_size, **dd) if lepe != "none" and lepe_kernel_size > 0 else None
        self.proj = MapLinear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x)
        q, k, v = qkv.reshape(B, H * W, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C)
        if self.lepe is not None:
            local = qkv[..., 2 * C :] if self.lepe_of_value else x
            out = self.lepe(local, out)
        return self.proj(out)
