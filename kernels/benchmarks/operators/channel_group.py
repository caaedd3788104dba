"""Channel-group attention beside timm's steps, eager and compiled.

``timm`` takes the steps of timm's DaViT on the same slices of one projection: groups before tokens, two batched
products, back. ``plain`` is our own reference, which is what runs without the fused kernel.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from visattn_kernels import channel_group_attention

from . import Case, Peer


class Shape(NamedTuple):
    """Batch, groups, channels of a group, map."""

    batch: int
    groups: int
    dim: int
    height: int
    width: int


SHAPES = {
    "smoke": [Shape(2, 3, 32, 28, 28)],
    # DaViT-T's stages at 224 px, batch 128, and its first two at 800x1216, batch 2.
    "table": [
        Shape(128, 3, 32, 56, 56),
        Shape(128, 6, 32, 28, 28),
        Shape(128, 12, 32, 14, 14),
        Shape(128, 24, 32, 7, 7),
        Shape(2, 3, 32, 200, 304),
        Shape(2, 6, 32, 100, 152),
    ],
}


def timm_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Channels' attention as timm's DaViT computes it, on maps (B, H, W, groups, dim)."""
    B, H, W, groups, dim = q.shape
    q, k, v = (x.reshape(B, H * W, groups, dim).transpose(1, 2) for x in (q, k, v))
    p = (q.transpose(-1, -2) @ (k * dim**-0.5)).softmax(dim=-1)
    out = (p @ v.transpose(-1, -2)).transpose(-1, -2)
    return out.transpose(1, 2).reshape(B, H, W, groups, dim)


def case(shape: Shape, dtype: torch.dtype) -> Case:
    """Tensors as slices of one projection, and who computes the attention."""
    B, groups, dim, H, W = shape
    torch.manual_seed(0)
    # As small as the products of a projection with few outliers: with larger ones the softmax is a choice of one.
    inputs = list((0.1 * torch.randn(B, H, W, 3, groups, dim, device="cuda")).to(dtype).unbind(3))

    def attend(backend: str) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return channel_group_attention(q, k, v, backend=backend)

        return call

    peers: dict[str, Peer] = {
        "timm": lambda: timm_steps,
        "compiled": lambda: torch.compile(timm_steps, dynamic=False),
        "plain": lambda: attend("reference"),
    }
    size = inputs[0].numel()
    name = ", ".join(map(str, shape))
    return Case(name, inputs, attend("triton"), peers, 4 * size * inputs[0].element_size(), 4 * size * dim, 0)
