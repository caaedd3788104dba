"""Layers of blocks that keep their maps channels last, (B, H, W, C), with the residual sums around them."""

from typing import Any

import torch
from timm.layers import LayerNorm, register_notrace_function
from torch import Tensor, nn
from visattn_kernels import add_layer_norm, depthwise_conv, layer_norm, linear

register_notrace_function(layer_norm)
register_notrace_function(add_layer_norm)
register_notrace_function(depthwise_conv)
register_notrace_function(linear)


class MapNorm(LayerNorm):
    """Layer norm over the last axis, fused on a GPU; parameters and defaults of timm's ``LayerNorm``.

    Shape:
        (..., C) -> (..., C)
    """

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """``x + branch`` and its norm, read and written once. Index the pair: a traced one cannot be unpacked."""
        return add_layer_norm(x, branch, self.weight, self.bias, self.eps)


class MapNorm2d(MapNorm):
    """As :class:`MapNorm`, over the channels of maps of convs.

    Shape:
        (B, C, H, W) -> (B, C, H, W)
    """

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x.permute(0, 2, 3, 1), self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class DepthwiseConv(nn.Conv2d):
    """Depthwise conv of a channels-last map, of stride 1 with zeros around, fused with the sum that follows it.

    Args:
        dim: Channels.
        kernel_size: Odd size of the filters.

    Shape:
        (B, H, W, dim) -> (B, H, W, dim), plus `add` of the same shape where given
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return depthwise_conv(x, self.weight, self.bias, add)


class MapLinear(nn.Linear):
    """``nn.Linear`` whose casts and gradients are one step on a GPU.

    Shape:
        (..., C) -> (..., C_out)
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
