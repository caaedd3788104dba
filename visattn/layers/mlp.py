"""Feed-forward layers that timm lacks."""

from typing import Any

import torch
from torch import Tensor, nn


class DepthwiseMlp(nn.Module):
    """Linear, 3x3 depthwise conv, GELU, linear, on a channels-last map.

    Args:
        in_features: Input and output width.
        hidden_features: Width between the linear layers.

    Shape:
        (B, H, W, in_features) -> (B, H, W, in_features)
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
        self.fc1 = nn.Linear(in_features, hidden_features, **dd)
        self.dwconv = nn.Conv2d(hidden_features, hidden_features, 3, padding=1, groups=hidden_features, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_features, in_features, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.act(x))
