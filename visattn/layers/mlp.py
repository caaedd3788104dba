"""Feed-forward layers of maps that timm lacks."""

from typing import Any

import torch
from torch import Tensor, nn

from .channels_last import DepthwiseConv, DepthwiseConv2d, MapLinear, PointwiseConv2d


class MapMlp(nn.Module):
    """Linear, GELU, linear.

    Args:
        in_features: Input and output width.
        hidden_features: Width between the linear layers.

    Shape:
        (..., in_features) -> (..., in_features)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = MapLinear(in_features, hidden_features, **dd)
        self.act = nn.GELU()
        self.fc2 = MapLinear(hidden_features, in_features, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DepthwiseMlp(nn.Module):
    """Linear, 3x3 depthwise conv, GELU, linear.

    Args:
        in_features: Input and output width.
        hidden_features: Width between the linear layers.
        drop: Dropout after the activation and after the last layer.
        use_conv: 1x1 convs on (B, C, H, W) instead of linear layers on (B, H, W, C), for blocks of convs, which then
            run in either memory format without a permutation.

    Shape:
        (B, H, W, in_features) -> (B, H, W, in_features), channels second with `use_conv`
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        drop: float = 0.0,
        use_conv: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        pointwise, depthwise = (PointwiseConv2d, DepthwiseConv2d) if use_conv else (MapLinear, DepthwiseConv)
        self.fc1 = pointwise(in_features, hidden_features, **dd)
        self.dwconv = depthwise(hidden_features, 3, **dd)
        self.act = nn.GELU()
        self.drop = nn.Dropout(drop)
        self.fc2 = pointwise(hidden_features, in_features, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.dwconv(self.fc1(x)))
        return self.drop(self.fc2(self.drop(x)))
