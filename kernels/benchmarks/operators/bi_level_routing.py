"""Bi-level routing attention beside gathered attention and FlexAttention, for a routing drawn at random.

``gather`` takes the steps of BiFormer's own code (arXiv 2303.08810): windows, gathered keys and values of the routed
regions, explicit softmax, windows back. ``compiled`` is the same through ``torch.compile``. ``flex`` is compiled
FlexAttention with a block mask from the same routing: the mask is made beforehand and not timed, sorting the tokens by
region and back is.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from visattn_kernels import bi_level_routing_attention

from . import Case, Peer

MAX_MASK = 1 << 32
"""Most pairs of tokens whose mask is made for FlexAttention."""


class Shape(NamedTuple):
    """Batch, heads, head dim, map, regions per side, regions that a region attends to."""

    batch: int
    heads: int
    dim: int
    height: int
    width: int
    regions: int
    topk: int


SHAPES = {
    "smoke": [Shape(2, 2, 32, 28, 28, 7, 4)],
    # BiFormer's three routing stages at 224 px, batch 128; at 800x1216, batch 2; 512 px and larger maps.
    "table": [
        Shape(128, 2, 32, 56, 56, 7, 1),
        Shape(128, 4, 32, 28, 28, 7, 4),
        Shape(128, 8, 32, 14, 14, 7, 16),
        Shape(2, 2, 32, 200, 304, 16, 1),
        Shape(2, 4, 32, 100, 152, 16, 4),
        Shape(2, 8, 32, 50, 76, 16, 16),
        Shape(2, 4, 32, 200, 304, 16, 4),
        Shape(2, 8, 32, 128, 128, 8, 16),
        Shape(16, 2, 32, 128, 128, 8, 2),
        Shape(16, 4, 32, 64, 64, 8, 8),
    ],
    "sweep": [
        *(Shape(32, 4, dim, 28, 28, 7, 4) for dim in (16, 24, 48, 64, 96, 128)),
        *(Shape(16, 4, 32, 56, 56, regions, 4) for regions in (2, 4, 8, 14, 28)),
        *(Shape(32, 4, 32, 28, 28, 7, topk) for topk in (1, 2, 8, 16, 49)),
        Shape(8, 4, 32, 45, 61, 7, 4),
    ],
}


def gather_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, regions: int) -> Tensor:
    """The steps of BiFormer's own code, on maps (B, H, W, heads, dim)."""
    B, H, W, heads, dim = q.shape
    rh, rw = -(-H // regions), -(-W // regions)
    R, t, topk = regions**2, rh * rw, indices.shape[-1]

    def windows(x: Tensor) -> Tensor:
        if (regions * rh, regions * rw) != (H, W):
            x = F.pad(x, (0, 0, 0, regions * rw - W, 0, regions * rh - H))
        x = x.reshape(B, regions, rh, regions, rw, -1).transpose(2, 3)
        return x.reshape(B, R, t, -1)

    kv = torch.cat([windows(k.flatten(3)), windows(v.flatten(3))], dim=-1)
    at = indices[..., None, None].expand(-1, -1, -1, t, kv.shape[-1])
    picked = torch.gather(kv[:, None].expand(-1, R, -1, -1, -1), 2, at)
    keys, values = picked.reshape(B * R, topk * t, 2, heads, dim).unbind(2)
    queries = windows(q.flatten(3)).reshape(B * R, t, heads, dim).transpose(1, 2)
    p = ((queries * dim**-0.5) @ keys.permute(0, 2, 3, 1)).softmax(dim=-1)
    out = (p @ values.transpose(1, 2)).transpose(1, 2)
    out = out.reshape(B, regions, regions, rh, rw, heads, dim).transpose(2, 3)
    return out.reshape(B, regions * rh, regions * rw, heads, dim)[:, :H, :W]


def flex_peer(shape: Shape, indices: Tensor) -> Callable[..., Tensor]:
    """FlexAttention on the same maps, its tokens sorted by region on the way in."""
    B, heads, dim, H, W, regions, _ = shape
    rh, rw = -(-H // regions), -(-W // regions)
    R, t = regions**2, rh * rw
    allowed = torch.zeros(B, R, R, dtype=torch.bool, device="cuda").scatter_(2, indices, True)

    def routed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return allowed[b, i // t, j // t]

    mask = torch.compile(create_block_mask)(routed, B, None, R * t, R * t, device="cuda")
    attend = torch.compile(flex_attention, dynamic=False)

    def sort(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, regions * rw - W, 0, regions * rh - H))
        x = x.reshape(B, regions, rh, regions, rw, heads, dim).permute(0, 5, 1, 3, 2, 4, 6)
        return x.reshape(B, heads, R * t, dim)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(sort(q), sort(k), sort(v), block_mask=mask)
        out = out.reshape(B, heads, regions, regions, rh, rw, dim).permute(0, 2, 4, 3, 5, 1, 6)
        return out.reshape(B, regions * rh, regions * rw, heads, dim)[:, :H, :W]

    return call


def case(shape: Shape, dtype: torch.dtype) -> Case:
    """Tensors as slices of one projection, a routing drawn at random, and who computes the attention."""
    B, heads, dim, H, W, regions, topk = shape
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, W, 3, heads, dim, device="cuda").to(dtype).unbind(3)
    indices = torch.rand(B, regions**2, regions**2, device="cuda").argsort(-1)[..., :topk].contiguous()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return bi_level_routing_attention(q, k, v, indices, regions, backend="triton")

    def gather(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return gather_attention(q, k, v, indices, regions)

    peers: dict[str, Peer] = {"gather": lambda: gather, "compiled": lambda: torch.compile(gather, dynamic=False)}
    t = -(-H // regions) * -(-W // regions)
    if B * (regions**2 * t) ** 2 <= MAX_MASK:
        peers["flex"] = lambda: flex_peer(shape, indices)
    pairs = B * heads * regions**2 * t * topk * t
    moved = 4 * q.numel() * q.element_size() + 4 * B * H * W * heads + 4 * indices.numel()
    name = f"{B}, {heads}, {dim}, {H}, {W}, {regions}, {topk}"
    return Case(name, [q, k, v], ours, peers, moved, 4 * pairs * dim, pairs)
