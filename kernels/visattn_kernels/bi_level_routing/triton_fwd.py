"""Fused forward of bi-level routing attention.

A program holds a tile of queries of one region and head and walks over the tokens of the routed key regions, which it
reads where they lie: no gathered keys, no permutation, no padded copy. Softmax runs on line in float32, in base 2.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import Launch, dot_precision, meta, unit_stride
from ..triton_tiles import LOG2E, divide, load_tokens, power_of_2
from .triton_tiling import forward_tiling

Pair = tuple[int, int]


@triton.jit
def place(token, region, regions_w, inv_regions_w, size_h, size_w, inv_size_w):
    """Row and column of a token (row-major in its region) of a region (row-major)."""
    region_y = divide(region, inv_regions_w)
    row = divide(token, inv_size_w)
    return region_y * size_h + row, (region - region_y * regions_w) * size_w + token - row * size_w


@triton.jit
def walk(i, list_, count, tokens, inv_tokens, steps, inv_steps, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """Step `i` over the tokens of the regions in a list: token in its region, list entry, position in the list, whether
    there is such a token.

    Packed: regions of few tokens lie side by side in one step. Otherwise a region takes `steps` steps of its own.
    """
    if PACKED:
        j = i * BLOCK + tl.arange(0, BLOCK)
        wanted = j < count * tokens
        at = divide(j, inv_tokens)
        token = j - at * tokens
        entry = tl.load(list_ + at, mask=wanted, other=0).to(tl.int32)
    else:
        at = divide(i, inv_steps)
        token = (i - at * steps) * BLOCK + tl.arange(0, BLOCK)
        wanted = token < tokens
        entry = tl.load(list_ + at).to(tl.int32)
    return token, entry, at, wanted


@triton.jit(do_not_specialize=["H", "W", "KH", "KW", "regions", "regions_w", "size_h", "size_w", "k_regions_w",
                               "k_size_h", "k_size_w", "tokens", "k_tokens", "topk", "tiles", "steps"])  # fmt: skip
def bra_fwd_kernel(
    q, k, v, indices, weights, pad_k, pad_v, out, lse,
    q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h, i_b, i_h,
    H, W, KH, KW, heads, regions, regions_w, inv_regions_w, size_h, size_w, inv_size_w,
    k_regions_w, inv_k_regions_w, k_size_h, k_size_w, inv_k_size_w, tokens, k_tokens, inv_k_tokens, topk, tiles,
    steps, inv_steps, scale,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr, K_EDGE: tl.constexpr,
    HAS_PAD_K: tl.constexpr, HAS_PAD_V: tl.constexpr, HAS_WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)  # heads vary fastest: they share cache lines
    head = pid % heads
    pid = pid // heads
    tile = pid % tiles
    pid = pid // tiles
    region = pid % regions
    b = (pid // regions).to(tl.int64)

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    y, x = place(m, region, regions_w, inv_regions_w, size_h, size_w, inv_size_w)
    inside = (y < H) & (x < W) & (m < tokens)
    queries = load_tokens(q + b * q_b + head * q_h, y * q_y + x * q_x, inside, inside, q, DIM, BLOCK_D, False, False)

    k_base, v_base = k + b * k_b + head * k_h, v + b * v_b + head * v_h
    routed = indices + b * i_b + head * i_h + region * topk
    factors = weights + b * i_b + head * i_h + region * topk
    all_keys: tl.constexpr = WHOLE and not K_EDGE
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # A tile wholly outside the map has nothing to do; told from scalars, for a bound that is one for all threads.
    first_y, _ = place(tile * BLOCK_M, region, regions_w, inv_regions_w, size_h, size_w, inv_size_w)
    count = topk if first_y < H and region % regions_w * size_w < W else 0
    for i in range(0, tl.cdiv(count * k_tokens, BLOCK_N) if PACKED else count * steps):
        token, key_region, slot, wanted = walk(
            i, routed, topk, k_tokens, inv_k_tokens, steps, inv_steps, PACKED, BLOCK_N
        )
        ky, kx = place(token, key_region, k_regions_w, inv_k_regions_w, k_size_h, k_size_w, inv_k_size_w)
        k_inside = (ky < KH) & (kx < KW) if K_EDGE else wanted
        rows_k = load_tokens(
            k_base, ky * k_y + kx * k_x, k_inside, wanted, pad_k + head * DIM, DIM, BLOCK_D, all_keys, HAS_PAD_K
        )
        s = tl.dot(queries, tl.trans(rows_k), input_precision=PRECISION)
        if HAS_WEIGHTS:
            factor = tl.load(factors + slot, mask=wanted if PACKED else None).to(tl.float32)
            s = s * (factor[None, :] if PACKED else factor)
        if not WHOLE:
            if PACKED:  # noqa: SIM114  decided when compiled, the other when run
                s = tl.where(wanted[None, :], s, float("-inf"))
            elif (slot + 1) * steps == i + 1:  # the last step of a region
                s = tl.where(wanted[None, :], s, float("-inf"))
        # The scale is positive: it moves out of the maximum and becomes one fused multiply-add.
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        if HAS_WEIGHTS:
            p = p * (tl.where(wanted, factor, 0.0)[None, :] if PACKED else factor)
        rows_v = load_tokens(
            v_base, ky * v_y + kx * v_x, k_inside, wanted, pad_v + head * DIM_V, DIM_V, BLOCK_DV, all_keys, HAS_PAD_V
        )
        acc = tl.dot(p.to(rows_v.dtype), rows_v, acc, input_precision=PRECISION)
        top = new_top

    if topk == 0:  # nothing to attend to
        total = total + 1.0
    place_out = ((b * H + y) * W + x) * heads + head
    d = tl.arange(0, BLOCK_DV)
    tl.store(
        out + place_out[:, None] * DIM_V + d[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=inside[:, None] & (d < DIM_V)[None, :],
    )
    tl.store(lse + place_out, (top + tl.log2(total)) / 1.4426950408889634, mask=inside)


def region_scalars(num_regions: Pair, region_size: Pair) -> tuple[float, ...]:
    """Arguments of :func:`place`."""
    return num_regions[1], 1 / num_regions[1], *region_size, 1 / region_size[1]


def index_strides(shape: torch.Size) -> tuple[int, int]:
    """Strides of batch and head of contiguous indices of `shape`, which all heads may share."""
    pairs = shape[-2] * shape[-1]
    return (pairs, 0) if len(shape) == 3 else (shape[1] * pairs, pairs)


@functools.lru_cache(4096)
def plan(
    q: Any, k: Any, v: Any, indices: Any, weights: Any, pads: tuple[Any, Any], geometry: tuple[Pair, ...], scale: float,
    precision: str,
) -> Launch:  # fmt: skip
    """The launch for arguments of these shapes, strides and dtypes."""
    (B, H, W, heads, dim), (KH, KW), dim_v, topk = q[0], k[0][1:3], v[0][-1], indices[0][-1]
    num, size, kv_num, kv_size = geometry
    regions, tokens, k_tokens = num[0] * num[1], size[0] * size[1], kv_size[0] * kv_size[1]
    edge = kv_num[0] * kv_size[0] > KH or kv_num[1] * kv_size[1] > KW
    way = forward_tiling(tokens, topk, k_tokens, max(dim, dim_v), edge)
    tiles, steps = triton.cdiv(tokens, way.held), way.steps(k_tokens)
    scalars = (
        *(s for x in (q, k, v) for s in x[1][:4]), *index_strides(indices[0]), H, W, KH, KW, heads, regions,
        *region_scalars(num, size), *region_scalars(kv_num, kv_size), tokens, k_tokens, 1 / k_tokens, topk, tiles,
        steps, 1 / steps, scale * LOG2E,
    )  # fmt: skip
    constants = {
        "DIM": dim, "DIM_V": dim_v, "BLOCK_D": power_of_2(dim), "BLOCK_DV": power_of_2(dim_v),
        "BLOCK_M": way.held, "BLOCK_N": way.step, "PACKED": way.packed, "WHOLE": way.whole(topk, k_tokens),
        "K_EDGE": edge, "HAS_PAD_K": edge and pads[0] is not None, "HAS_PAD_V": edge and pads[1] is not None,
        "HAS_WEIGHTS": weights is not None, "PRECISION": precision,
    }  # fmt: skip
    programs = B * heads * regions * tiles
    return Launch(bra_fwd_kernel, programs, scalars, constants, way.warps, way.stages, way.registers)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    num_regions: Pair,
    region_size: Pair,
    kv_num_regions: Pair,
    kv_region_size: Pair,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, heads, dim_v) and log-sum-exp (B, H, W, heads) float32; arguments as the reference's."""
    out = torch.empty(q.shape[:-1] + v.shape[-1:], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v, indices = unit_stride(q), unit_stride(k), unit_stride(v), indices.contiguous()
    weights, pad_k, pad_v = (x if x is None else x.contiguous() for x in (weights, pad_k, pad_v))
    geometry = (tuple(num_regions), tuple(region_size), tuple(kv_num_regions), tuple(kv_region_size))
    launch = plan(
        meta(q), meta(k), meta(v), meta(indices), meta(weights), (meta(pad_k), meta(pad_v)), geometry, scale,
        dot_precision(q.dtype),
    )  # fmt: skip
    launch(q, k, v, indices, *(q if x is None else x for x in (weights, pad_k, pad_v)), out, lse)
    return out, lse
