"""Geometry of heads-last maps, shared by the operators. Scriptable."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import any_size


def pad_map(x: Tensor, height: int, width: int, pad: Tensor | None) -> Tensor:
    """Grow a map (B, H, W, heads, dim) to (height, width) at the bottom and right.

    New tokens hold `pad` (heads, dim), or zeros.
    """
    B, H, W, heads, dim = x.shape
    if any_size([H, W]):  # a graph cannot add none or some: it adds one token, and selects it as often as it takes
        fill = x.new_zeros([heads, dim]) if pad is None else pad.to(x.dtype)
        x = torch.cat([x, fill.expand(B, H, 1, heads, dim)], dim=2)
        x = x.index_select(2, torch.arange(width, device=x.device).clamp(max=W))
        x = torch.cat([x, fill.expand(B, 1, width, heads, dim)], dim=1)
        return x.index_select(1, torch.arange(height, device=x.device).clamp(max=H))
    if height == H and width == W:
        return x
    if pad is None:
        return F.pad(x, (0, 0, 0, 0, 0, width - W, 0, height - H))
    fill = pad.to(x.dtype)
    x = torch.cat([x, fill.expand(B, H, width - W, heads, dim)], dim=2)
    return torch.cat([x, fill.expand(B, height - H, width, heads, dim)], dim=1)


def crop_map(x: Tensor, height: int, width: int) -> Tensor:
    """The first `height` rows and `width` columns of a map (B, H, W, ...)."""
    if any_size([height, width]):  # a slice does not know that its end lies on the map, and so not its size
        x = x.index_select(2, torch.arange(width, device=x.device))
        return x.index_select(1, torch.arange(height, device=x.device))
    return x[:, :height, :width]


def regroup(x: Tensor, shape: list[int]) -> Tensor:
    """`x` reshaped to `shape`, for tensors that their strides may keep from being viewed like that."""
    if any_size(shape):  # a graph must know whether that copies: here always
        x = x.clone(memory_format=torch.contiguous_format)
    return x.reshape(shape)
