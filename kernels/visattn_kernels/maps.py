"""Geometry of heads-last maps, shared by the operators. Scriptable."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_map(x: Tensor, height: int, width: int, pad: Tensor | None) -> Tensor:
    """Grow a map (B, H, W, heads, dim) to (height, width) at the bottom and right.

    New tokens hold `pad` (heads, dim), or zeros.
    """
    B, H, W, heads, dim = x.shape
    if height == H and width == W:
        return x
    if pad is None:
        return F.pad(x, (0, 0, 0, 0, 0, width - W, 0, height - H))
    fill = pad.to(x.dtype)
    x = torch.cat([x, fill.expand(B, H, width - W, heads, dim)], dim=2)
    return torch.cat([x, fill.expand(B, height - H, width, heads, dim)], dim=1)
