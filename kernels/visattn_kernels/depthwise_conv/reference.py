"""Plain torch depthwise convolution: the specification of the operator. Scriptable."""

import torch.nn.functional as F
from torch import Tensor


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, dilation: int = 1) -> Tensor:
    """Conv of a map (B, H, W, C) with zeros around it, plus `add`."""
    padding = dilation * (weight.shape[2] - 1) // 2
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, 1, padding, dilation, weight.shape[0]).permute(0, 2, 3, 1)
    return out if add is None else add + out
