"""Fused region routing, for routings without gradients: region means, then affinities and the best of them, in two
launches."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import Launch, meta, unit_stride
from .triton_fwd import Pair, place, region_scalars


@triton.jit
def region_mean(
    x, pad, x_y, x_x, x_h, channel, region, H, W, tokens, regions_w, inv_regions_w, size_h, size_w, inv_size_w,
    DIM: tl.constexpr, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, JOINED: tl.constexpr,
    HAS_PAD: tl.constexpr, COUNT_PADDING: tl.constexpr,
):  # fmt: skip
    """Mean of some channels over one region of the image at `x`, in float32."""
    inside_c = channel < C
    # Heads that lie side by side are one run of channels, which is read in wide words.
    at_c = channel if JOINED else channel // DIM * x_h + channel % DIM
    acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for first in range(0, tokens, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        y, col = place(token, region, regions_w, inv_regions_w, size_h, size_w, inv_size_w)
        inside = (y < H) & (col < W) & (token < tokens)
        at = (y * x_y + col * x_x)[:, None] + at_c[None, :]
        acc += tl.load(x + at, mask=inside[:, None] & inside_c[None, :], other=0.0).to(tl.float32)
    total = tl.sum(acc, 0)
    top, left = place(tl.zeros([1], tl.int32), region, regions_w, inv_regions_w, size_h, size_w, inv_size_w)
    real = tl.minimum(tl.maximum(H - top, 0), size_h) * tl.minimum(tl.maximum(W - left, 0), size_w)
    real = real.to(tl.float32)
    if COUNT_PADDING:
        if HAS_PAD:
            total += tl.load(pad + channel, mask=inside_c, other=0.0).to(tl.float32) * (tokens - real)
        return total / tokens
    else:
        return total / tl.maximum(real, 1.0)


@triton.jit(do_not_specialize=["H", "W", "B", "regions", "tokens", "regions_w", "size_h", "size_w"])
def region_means_kernel(
    q, k, pad_q, pad_k, means, q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, H, W, B, regions, tokens,
    regions_w, inv_regions_w, size_h, size_w, inv_size_w, c_blocks,
    DIM: tl.constexpr, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, JOINED: tl.constexpr,
    HAS_PAD_Q: tl.constexpr, HAS_PAD_K: tl.constexpr, COUNT_PADDING: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    channel = (pid % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = pid // c_blocks
    region = row % regions
    b = (row // regions).to(tl.int64)
    at = row.to(tl.int64) * C + channel
    mean = region_mean(
        q + b * q_b, pad_q, q_y, q_x, q_h, channel, region, H, W, tokens, regions_w, inv_regions_w, size_h, size_w,
        inv_size_w, DIM, C, BLOCK_T, BLOCK_C, JOINED, HAS_PAD_Q, COUNT_PADDING,
    )  # fmt: skip
    tl.store(means + at, mean, mask=channel < C)
    mean = region_mean(
        k + b * k_b, pad_k, k_y, k_x, k_h, channel, region, H, W, tokens, regions_w, inv_regions_w, size_h, size_w,
        inv_size_w, DIM, C, BLOCK_T, BLOCK_C, JOINED, HAS_PAD_K, COUNT_PADDING,
    )  # fmt: skip
    tl.store(means + tl.cast(B, tl.int64) * regions * C + at, mean, mask=channel < C)


@triton.jit(do_not_specialize=["B", "regions", "topk"])
def region_topk_kernel(
    means, indices, weights, B, regions, topk, tiles, scale,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    r = (pid % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.arange(0, BLOCK_J)
    b = (pid // tiles).to(tl.int64)
    q = means + b * regions * C
    k = means + (B + b) * regions * C
    s = tl.zeros([BLOCK_R, BLOCK_J], tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        rows = tl.load(q + r[:, None] * C + c[None, :], mask=(r < regions)[:, None] & (c < C)[None, :], other=0.0)
        cols = tl.load(k + j[None, :] * C + c[:, None], mask=(j < regions)[None, :] & (c < C)[:, None], other=0.0)
        s = tl.dot(rows, cols, s, input_precision="ieee")
    # No number wins nowhere: indices stay in range whatever the input.
    s = tl.where((j < regions)[None, :] & (s == s), s * scale, float("-inf"))
    slots = tl.arange(0, BLOCK_K)
    best = tl.full([BLOCK_R, BLOCK_K], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK_R, BLOCK_K], tl.int32)
    for slot in range(0, topk):
        value, at = tl.max(s, 1, return_indices=True)
        mine = (slots == slot)[None, :]
        best = tl.where(mine, value[:, None], best)
        where = tl.where(mine, at[:, None], where)
        s = tl.where(j[None, :] == at[:, None], float("-inf"), s)
    p = tl.exp(best - tl.max(best, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    mask = (r < regions)[:, None] & (slots < topk)[None, :]
    out = (b * regions + r)[:, None] * topk + slots[None, :]
    tl.store(indices + out, where.to(tl.int64), mask=mask)
    tl.store(weights + out, p.to(weights.dtype.element_ty), mask=mask)


@functools.lru_cache(4096)
def plan(
    q: Any, k: Any, pads: tuple[Any, Any], num: Pair, size: Pair, topk: int, count_padding: bool, scale: float,
) -> tuple[Launch, Launch]:  # fmt: skip
    """The two launches for arguments of these shapes, strides and dtypes."""
    B, H, W, heads, dim = q[0]
    C, regions, tokens = heads * dim, num[0] * num[1], size[0] * size[1]
    block_c = min(128, triton.next_power_of_2(C))
    block_t = min(triton.next_power_of_2(tokens), 4096 // block_c)
    c_blocks = triton.cdiv(C, block_c)
    padded = num[0] * size[0] > H or num[1] * size[1] > W
    means = Launch(
        region_means_kernel,
        B * regions * c_blocks,
        (*q[1][:4], *k[1][:4], H, W, B, regions, tokens, *region_scalars(num, size), c_blocks),
        {
            "DIM": dim, "C": C, "BLOCK_T": block_t, "BLOCK_C": block_c,
            "JOINED": q[1][3] == dim and k[1][3] == dim,
            "HAS_PAD_Q": padded and pads[0] is not None, "HAS_PAD_K": padded and pads[1] is not None,
            "COUNT_PADDING": count_padding,
        },
        warps=1 if block_t * block_c <= 1024 else 4,
    )  # fmt: skip
    tiles, block_j = triton.cdiv(regions, 16), max(16, triton.next_power_of_2(regions))
    best = Launch(
        region_topk_kernel,
        B * tiles,
        (B, regions, topk, tiles, scale),
        {
            "C": C, "BLOCK_R": 16, "BLOCK_J": block_j, "BLOCK_C": max(16, min(32, triton.next_power_of_2(C))),
            "BLOCK_K": triton.next_power_of_2(topk),
        },
        warps=1 if block_j <= 64 else 4 if block_j <= 256 else 8,
    )  # fmt: skip
    return means, best


def region_routing(
    q: Tensor,
    k: Tensor,
    num_regions: Pair,
    topk: int,
    region_size: Pair,
    pad_q: Tensor | None,
    pad_k: Tensor | None,
    count_padding: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Indices and weights of the reference's :func:`region_routing`, without gradients."""
    shape = (q.shape[0], num_regions[0] * num_regions[1], topk)
    indices = torch.empty(shape, dtype=torch.int64, device=q.device)
    weights = torch.empty(shape, dtype=q.dtype, device=q.device)
    if indices.numel() == 0:
        return indices, weights
    q, k = unit_stride(q), unit_stride(k)
    pad_q, pad_k = (x if x is None else x.contiguous() for x in (pad_q, pad_k))
    means, best = plan(
        meta(q), meta(k), (meta(pad_q), meta(pad_k)), tuple(num_regions), tuple(region_size), topk, count_padding,
        scale,
    )  # fmt: skip
    sums = torch.empty(2 * shape[0] * shape[1] * q.shape[3] * q.shape[4], dtype=torch.float32, device=q.device)
    means(q, k, q if pad_q is None else pad_q, k if pad_k is None else pad_k, sums)
    best(sums, indices, weights)
    return indices, weights
