"""Window attention beside torch's fused attention on windows that are copied out of the map and back (``sdpa``)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from visattn_kernels import window_attention

from . import Case


class Shape(NamedTuple):
    """Batch, heads, head dim, map, tokens per side of a window."""

    batch: int
    heads: int
    dim: int
    height: int
    width: int
    window: int


SHAPES = {
    "smoke": [Shape(2, 3, 32, 28, 28, 7)],
    # DaViT-T's stages at 224 px, batch 128, and its first at 800x1216, whose windows reach past the border.
    "table": [
        Shape(128, 3, 32, 56, 56, 7),
        Shape(128, 6, 32, 28, 28, 7),
        Shape(128, 12, 32, 14, 14, 7),
        Shape(128, 24, 32, 7, 7, 7),
        Shape(2, 3, 32, 200, 304, 7),
    ],
}


def case(shape: Shape, dtype: torch.dtype) -> Case:
    """Tensors as slices of one projection, keys and values outside the map as its bias."""
    B, heads, dim, H, W, size = shape
    torch.manual_seed(0)
    inputs = list(torch.randn(B, H, W, 3, heads, dim, device="cuda").to(dtype).unbind(3))
    pad_k, pad_v = torch.randn(2, heads, dim, device="cuda").to(dtype)

    def attend(backend: str) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return window_attention(q, k, v, size, pad_k.to(q.dtype), pad_v.to(q.dtype), backend=backend)

        return call

    pairs = B * heads * H * W * size**2
    moved = 4 * inputs[0].numel() * inputs[0].element_size() + 4 * B * H * W * heads
    name = ", ".join(map(str, shape))
    return Case(name, inputs, attend("triton"), {"sdpa": lambda: attend("reference")}, moved, 4 * pairs * dim, pairs)
