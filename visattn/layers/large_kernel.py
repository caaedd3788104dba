"""Large-kernel attention (VAN, arXiv 2202.09741): a gate that reads a wide neighbourhood through depthwise convs."""

from typing import Any

import torch
from torch import Tensor, nn

from .channels_last import DepthwiseConv2d, PointwiseConv2d


class LargeKernelGate(nn.Module):
    """Multiply a map by a large depthwise conv of itself.

    The conv of `kernel_size` is decomposed as in the paper's Eq. 3: a depthwise conv of 2 * `dilation` - 1, one of
    ceil(`kernel_size` / `dilation`) with that dilation, and a pointwise conv. The product has no sigmoid or softmax.

    Args:
        dim: Width.
        kernel_size: Kernel to cover. Default 21, with which every pixel reads 23x23.
        dilation: Dilation of the second conv.

    Shape:
        (B, dim, H, W) -> (B, dim, H, W)

    Raises:
        ValueError: A size out of range, or a decomposition that cannot be centred.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 21,
        dilation: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dilation < 1:
            raise ValueError(f"dilation={dilation} must be at least 1")
        if kernel_size < dilation:
            raise ValueError(f"kernel_size={kernel_size} must be at least dilation={dilation}")
        taps = (kernel_size + dilation - 1) // dilation
        reach = dilation * (taps - 1)
        if reach % 2:
            raise ValueError(
                f"kernel_size={kernel_size} with dilation={dilation} gives {taps} taps over {reach + 1} pixels, which "
                f"have no centre; use an odd number of taps or an even dilation"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.local_conv = DepthwiseConv2d(dim, 2 * dilation - 1, **dd)
        self.dilated_conv = DepthwiseConv2d(dim, taps, dilation, **dd)
        self.point_conv = PointwiseConv2d(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.point_conv(self.dilated_conv(self.local_conv(x)))


class LargeKernelAttention(nn.Module):
    """Pointwise conv, GELU, :class:`LargeKernelGate`, pointwise conv, and the input added.

    The shortcut is inside on purpose: with a layer scale around it, the paper (Sec. 4.1) scales f(x) + x, not f(x).

    Args:
        dim: Width.
        kernel_size: See :class:`LargeKernelGate`.
        dilation: See :class:`LargeKernelGate`.

    Shape:
        (B, dim, H, W) -> (B, dim, H, W)

    Raises:
        ValueError: As :class:`LargeKernelGate`.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 21,
        dilation: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj_in = PointwiseConv2d(dim, dim, **dd)
        self.act = nn.GELU()
        self.gate = LargeKernelGate(dim, kernel_size, dilation, **dd)
        self.proj_out = PointwiseConv2d(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.gate(self.act(self.proj_in(x)))) + x
