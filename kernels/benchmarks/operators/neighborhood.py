"""Neighborhood attention beside FlexAttention, plain torch and, on small maps, dense attention with a mask.

``flex`` is compiled FlexAttention with a block mask of the windows. The mask is made beforehand and not timed; tokens
are sorted by dilation group and, on larger maps, in tiles of up to 8 x 8, so that blocks of 128 tokens hold
neighbours, which is timed.
``sdpa`` is torch's dense attention with an additive mask, on maps of up to 1,024 tokens. ``natten`` is NATTEN as it
chooses its kernels and tiles, where it is installed. ``plain`` is our own reference with recomputation, which works on
blocks of queries.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from visattn_kernels import neighborhood_attention

from . import Case, Peer

FEW = 1024
"""Tokens of the largest map that dense attention takes part on and whose rows FlexAttention reads as they are."""
SQUARE = 8
"""Tokens per side of FlexAttention's tiles."""


class Shape(NamedTuple):
    """Batch, heads, head dim, map, kernel, dilation, stride, and whether there is a table of biases."""

    batch: int
    heads: int
    dim: int
    height: int
    width: int
    kernel: int
    dilation: int = 1
    stride: int = 1
    bias: bool = False


_TABLE = [
    Shape(128, 2, 32, 56, 56, 7),
    Shape(128, 4, 32, 28, 28, 7),
    Shape(128, 8, 32, 14, 14, 7),
    Shape(128, 4, 32, 56, 56, 13),
    Shape(128, 2, 32, 56, 56, 7, 8),
    Shape(128, 4, 32, 28, 28, 7, 4),
    Shape(2, 2, 32, 200, 304, 7),
    Shape(2, 4, 32, 100, 152, 7),
    Shape(1, 16, 64, 128, 128, 13),
    Shape(1, 16, 128, 128, 128, 33),
    Shape(128, 2, 32, 56, 56, 7, 1, 7),
]
SHAPES = {
    "smoke": [Shape(2, 2, 32, 28, 28, 7)],
    "table": _TABLE,
    "bias": [shape._replace(bias=True) for shape in _TABLE],
}


def window_of(at: Tensor, length: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """Dilation group, and first key's position in it, of the windows of queries at coordinates `at` of an axis."""
    group = at % shape.dilation
    n = (length - 1 - group) // shape.dilation + 1
    leader = torch.minimum(at // shape.dilation // shape.stride * shape.stride + shape.stride // 2, n - 1)
    return group, torch.minimum((leader - shape.kernel // 2).clamp(min=0), n - shape.kernel)


class Tiles(NamedTuple):
    """How FlexAttention's tokens are sorted along an axis: dilation groups, tiles of a group, tokens of a tile."""

    groups: int
    tiles: int
    tokens: int


def tiles_of(length: int, shape: Shape) -> Tiles:
    """Tiles of neighbours of one group, of a stride's queries where there is one; whole groups and tiles only.

    In maps of few tokens groups stay in rows: sorting them further takes longer than it saves.
    """
    groups = shape.dilation if length % shape.dilation == 0 else 1
    small = shape.height * shape.width <= FEW
    tokens = 1 if small else math.gcd(length // groups, shape.stride if shape.stride > 1 else SQUARE)
    return Tiles(groups, length // groups // tokens, tokens)


def sorted_tokens(x: Tensor, rows: Tiles, columns: Tiles) -> Tensor:
    """Maps (B, H, W, ...) as sequences (B, H * W, ...): by group, tile, row and column in the tile."""
    x = x.unflatten(1, (rows.tiles, rows.tokens, rows.groups))
    x = x.unflatten(4, (columns.tiles, columns.tokens, columns.groups))
    return x.movedim((3, 6, 1, 4, 2, 5), (1, 2, 3, 4, 5, 6)).flatten(1, 6)


def as_map(x: Tensor, rows: Tiles, columns: Tiles) -> Tensor:
    """The inverse of :func:`sorted_tokens`."""
    x = x.unflatten(1, (rows.groups, columns.groups, rows.tiles, columns.tiles, rows.tokens, columns.tokens))
    x = x.movedim((3, 5, 1, 4, 6, 2), (1, 2, 3, 4, 5, 6))
    return x.flatten(1, 3).flatten(2, 4)


def flex_peer(shape: Shape) -> Callable[..., Tensor]:
    """FlexAttention on the same maps, its tokens sorted on the way in and back on the way out."""
    H, W, kernel, dilation = shape[3:7]
    tiles = tiles_of(H, shape), tiles_of(W, shape)
    rows = torch.arange(H, device="cuda")[:, None].expand(H, W)
    columns = torch.arange(W, device="cuda").expand(H, W)
    y, x = (sorted_tokens(at[None], *tiles)[0] for at in (rows, columns))

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        result = None
        for at, length in ((y, H), (x, W)):
            group, first = window_of(at[i], length, shape)
            key = at[j] // dilation
            here = (at[j] % dilation == group) & (key >= first) & (key < first + kernel)
            result = here if result is None else result & here
        assert result is not None
        return result

    # Eager, N x N bytes at a time: compiled it takes minutes for some maps.
    mask = create_block_mask(seen, None, None, H * W, H * W, device="cuda")
    attend = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(*(sorted_tokens(t, *tiles).transpose(1, 2) for t in (q, k, v)), block_mask=mask)
        return as_map(out.transpose(1, 2), *tiles)

    return call


def dense_mask(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Additive mask (H * W, H * W) of the windows."""
    masks = []
    for length in (shape.height, shape.width):
        at = torch.arange(length, device="cuda")
        group, first = window_of(at, length, shape)
        key = at // shape.dilation
        here = (key >= first[:, None]) & (key < first[:, None] + shape.kernel)
        masks.append(here & (at % shape.dilation == group[:, None]))
    tokens = shape.height * shape.width
    seen = (masks[0][:, None, :, None] & masks[1][None, :, None, :]).reshape(tokens, tokens)
    return torch.zeros(tokens, tokens, device="cuda", dtype=dtype).masked_fill(~seen, float("-inf"))


def dense_peer(shape: Shape) -> Callable[..., Tensor]:
    """Torch's dense attention with the mask, which is made beforehand."""
    mask = dense_mask(shape, torch.float32)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
        return out.transpose(1, 2).reshape(-1, shape.height, shape.width, shape.heads, shape.dim)

    return call


def natten_peer(shape: Shape) -> Callable[..., Tensor]:
    """NATTEN's own function, on contiguous maps."""
    from natten.functional import na2d

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        maps = (x.contiguous() for x in (q, k, v))
        return na2d(*maps, kernel_size=shape.kernel, stride=shape.stride, dilation=shape.dilation)

    return call


def case(shape: Shape, dtype: torch.dtype) -> Case:
    """Tensors as slices of one projection, and who computes the attention."""
    B, heads, dim, H, W, kernel, dilation, stride, bias = shape
    torch.manual_seed(0)
    inputs = list(torch.randn(B, H, W, 3, heads, dim, device="cuda").to(dtype).unbind(3))
    if bias:
        inputs.append(torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, device="cuda").to(dtype))

    def attend(backend: str) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
            return neighborhood_attention(q, k, v, kernel, stride, dilation, rel_pos_bias=table, backend=backend)

        return call

    peers: dict[str, Peer] = {}
    if not bias:
        peers["flex"] = lambda: flex_peer(shape)
        if H * W <= FEW:
            peers["sdpa"] = lambda: dense_peer(shape)
        if importlib.util.find_spec("natten") is not None:
            peers["natten"] = lambda: natten_peer(shape)
    peers["plain"] = lambda: attend("recompute")
    pairs = B * heads * H * W * kernel**2
    q = inputs[0]
    moved = 4 * q.numel() * q.element_size() + 4 * B * H * W * heads
    name = ", ".join(str(n) for n in shape[:7]) + (f", stride {stride}" if stride > 1 else "")
    return Case(name + (", bias" if bias else ""), inputs, attend("triton"), peers, moved, 4 * pairs * dim, pairs)
