"""Layers of blocks that keep their maps channels last, (B, H, W, C), with the residual sums around them."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, register_notrace_function
from torch import Tensor, nn
from visattn_kernels import add_layer_norm, depthwise_conv, layer_norm, linear

register_notrace_function(layer_norm)
register_notrace_function(add_layer_norm)
register_notrace_function(depthwise_conv)
register_notrace_function(linear)
torch.fx.wrap("add_layer_norm")  # also where no layer of this file has been called before; timm's tracer looks then


class MapNorm(LayerNorm):
    """Layer norm over the last axis, fused on a GPU; parameters and defaults of timm's ``LayerNorm``.

    Shape:
        (..., C) -> (..., C)
    """

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x + branch`` and its norm, read and written once; the gradients of `x` are, too, also without a branch.

        Index the pair: a traced one cannot be unpacked.
        """
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
        kernel_size: Size of the filters; odd, or any with an even `dilation`.
        dilation: Pixels between their taps.

    Shape:
        (B, H, W, dim) -> (B, H, W, dim), plus `add` of the same shape where given
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        padding = dilation * (kernel_size - 1) // 2
        super().__init__(dim, dim, kernel_size, padding=padding, dilation=dilation, groups=dim, **dd)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return depthwise_conv(x, self.weight, self.bias, add, self.dilation[0])


class DepthwiseConv2d(DepthwiseConv):
    """As :class:`DepthwiseConv`, of maps of convs, which had better lie channels last in memory on a GPU.

    Shape:
        (B, dim, H, W) -> (B, dim, H, W)
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        out = depthwise_conv(x.permute(0, 2, 3, 1), self.weight, self.bias, None, self.dilation[0])
        return out.permute(0, 3, 1, 2)


def is_better_as_product(x: Tensor) -> bool:
    """Whether a 1x1 conv of a map (B, C, H, W) had better be a matrix product: on a GPU, where the map lies channels
    last in memory."""
    return x.is_cuda and x.is_contiguous(memory_format=torch.channels_last)


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1x1 conv of a map (B, C, H, W), see :func:`is_better_as_product`. cuDNN leaves the bias to a pass of its own."""
    if is_better_as_product(x):
        return linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias)


register_notrace_function(pointwise_conv)


class PointwiseConv2d(nn.Conv2d):
    """1x1 conv, see :func:`pointwise_conv`.

    Args:
        dim: Channels.
        out_dim: Channels of the result.

    Shape:
        (B, dim, H, W) -> (B, out_dim, H, W)
    """

    def __init__(
        self, dim: int, out_dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, out_dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise_conv(x, self.weight, self.bias)


class MapLinear(nn.Linear):
    """``nn.Linear`` whose casts and gradients are one step on a GPU.

    Shape:
        (..., C) -> (..., C_out)
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
