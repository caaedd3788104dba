"""Fused forward of channel-group attention: logits as sums over runs of tokens, then the values' channels mixed.

The maps are read where they lie, without a copy by groups. Sums of all runs are added in a fixed order.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import Launch, dot_precision, meta, unit_stride
from ..triton_tiles import load_tokens, power_of_2

PROGRAMS = 1056
"""Programs to make at least, where there are tokens enough: eight per multiprocessor of a large GPU."""
TILE_BYTES = 1 << 13
"""Bytes of a map per step: more would spill in float32."""


@triton.jit
def channel_products_kernel(
    x, y, out, x_b, x_n, x_g, y_b, y_n, y_g, tokens, run, runs, groups,
    DIM_X: tl.constexpr, DIM_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of the channels of `x` and `y`, summed over one run of tokens."""
    pid = tl.program_id(0)
    b, g = (pid // runs // groups).to(tl.int64), pid // runs % groups
    x += b * x_b + g * x_g
    y += b * y_b + g * y_g
    start = pid % runs * run
    end = tl.minimum(start + run, tokens)
    acc = tl.zeros([BLOCK_X, BLOCK_Y], tl.float32)
    for first in range(start, end, BLOCK_T):
        n = first + tl.arange(0, BLOCK_T)
        inside = n < end
        left = load_tokens(x, n * x_n, inside, inside, x, DIM_X, BLOCK_X, False, False)
        right = load_tokens(y, n * y_n, inside, inside, y, DIM_Y, BLOCK_Y, False, False)
        acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)
    c, e = tl.arange(0, BLOCK_X)[:, None], tl.arange(0, BLOCK_Y)[None, :]
    out += pid.to(tl.int64) * DIM_X * DIM_Y
    tl.store(out + c * DIM_Y + e, acc, mask=(c < DIM_X) & (e < DIM_Y))


@triton.jit
def load_matrix(base, DIM_X: tl.constexpr, DIM_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr):
    """A matrix (DIM_X, DIM_Y) with zeros around."""
    c, e = tl.arange(0, BLOCK_X)[:, None], tl.arange(0, BLOCK_Y)[None, :]
    return tl.load(base + c * DIM_Y + e, mask=(c < DIM_X) & (e < DIM_Y), other=0.0)


@triton.jit
def channel_softmax(logits, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Softmax over the first `DIM` columns; the others become zero."""
    logits = tl.where((tl.arange(0, BLOCK) < DIM)[None, :], logits, float("-inf"))
    p = tl.exp(logits - tl.max(logits, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def channel_mix_kernel(
    v, logits, out, v_b, v_n, v_g, tokens, run, runs, groups,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of one run of tokens."""
    pid = tl.program_id(0)
    group = pid // runs
    b, g = (group // groups).to(tl.int64), group % groups
    v += b * v_b + g * v_g
    out += (b * tokens * groups + g) * DIM
    p = load_matrix(logits + group.to(tl.int64) * DIM * DIM_V, DIM, DIM_V, BLOCK, BLOCK_V)
    p = tl.trans(channel_softmax(p, DIM_V, BLOCK_V)).to(v.dtype.element_ty)
    c = tl.arange(0, BLOCK)
    start = pid % runs * run
    end = tl.minimum(start + run, tokens)
    for first in range(start, end, BLOCK_T):
        n = first + tl.arange(0, BLOCK_T)
        inside = n < end
        values = load_tokens(v, n * v_n, inside, inside, v, DIM_V, BLOCK_V, False, False)
        mixed = tl.dot(values, p, input_precision=PRECISION)
        at = n[:, None] * (groups * DIM) + c[None, :]
        tl.store(out + at, mixed.to(out.dtype.element_ty), mask=inside[:, None] & (c < DIM)[None, :])


def by_token(x: Tensor) -> Tensor:
    """Map (B, H, W, groups, dim) as (B, H * W, groups, dim), copied if tokens lie unevenly or channels apart."""
    return unit_stride(x.flatten(1, 2))


def runs_of(tokens: int, groups: int, tile: int) -> tuple[int, int]:
    """Tokens per program, a multiple of `tile`, and programs per group of an image, of which there are `groups`."""
    steps = triton.cdiv(tokens, tile)
    run = triton.cdiv(steps, min(steps, triton.cdiv(PROGRAMS, groups))) * tile
    return run, triton.cdiv(tokens, run)


def tile_of(tokens: int, dtype: torch.dtype, *dims: int) -> int:
    """Tokens per step."""
    return min(128, power_of_2(tokens), TILE_BYTES // dtype.itemsize // power_of_2(max(dims)))


@functools.lru_cache(4096)
def plan_products(x: Any, y: Any, precision: str) -> tuple[Launch, int]:
    """The launch for tokens (B, tokens, groups, dim) of these layouts, and the runs that they are cut into."""
    B, tokens, groups, dim = x[0]
    tile = tile_of(tokens, x[2], dim, y[0][3])
    run, runs = runs_of(tokens, B * groups, tile)
    launch = Launch(
        channel_products_kernel,
        B * groups * runs,
        (*x[1][:3], *y[1][:3], tokens, run, runs, groups),
        {
            "DIM_X": dim, "DIM_Y": y[0][3], "BLOCK_X": power_of_2(dim), "BLOCK_Y": power_of_2(y[0][3]),
            "BLOCK_T": tile, "PRECISION": precision,
        },
        stages=3,
    )  # fmt: skip
    return launch, runs


def products(x: Tensor, y: Tensor) -> Tensor:
    """Products of channels summed over tokens, (B, groups, dim of `x`, dim of `y`), in float32."""
    B, _, groups, dim = x.shape
    launch, runs = plan_products(meta(x), meta(y), dot_precision(x.dtype))
    sums = torch.empty(B, groups, runs, dim, y.shape[3], dtype=torch.float32, device=x.device)
    launch(x, y, sums)
    return sums[:, :, 0] if runs == 1 else sums.sum(2)


@functools.lru_cache(4096)
def plan_mix(v: Any, dim: int, precision: str) -> Launch:
    """The launch for values (B, tokens, groups, dim_v) of this layout and `dim` channels of output."""
    B, tokens, groups, dim_v = v[0]
    tile = tile_of(tokens, v[2], dim, dim_v)
    run, runs = runs_of(tokens, B * groups, tile)
    return Launch(
        channel_mix_kernel,
        B * groups * runs,
        (*v[1][:3], tokens, run, runs, groups),
        {
            "DIM": dim, "DIM_V": dim_v, "BLOCK": power_of_2(dim), "BLOCK_V": power_of_2(dim_v), "BLOCK_T": tile,
            "PRECISION": precision,
        },
    )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output, contiguous, and logits (B, groups, dim, dim_v) in float32."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not q.numel():
        return out, q.new_zeros(q.shape[0], *q.shape[3:], k.shape[4], dtype=torch.float32)
    logits = products(by_token(q), by_token(k)) * scale
    tokens = by_token(v)
    plan_mix(meta(tokens), q.shape[4], dot_precision(v.dtype))(tokens, logits, out)
    return out, logits
