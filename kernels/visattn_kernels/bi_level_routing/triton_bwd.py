"""Fused backward of bi-level routing attention, without float atomics: bit-identical from run to run.

Gradients of queries walk over the routed keys, as the forward does. Gradients of keys and values walk over the queries
that are routed to a key region, in the order of the inverse routing, which one small kernel writes beforehand.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import Launch, dot_precision, meta, unit_stride
from ..triton_tiles import LOG2E, divide, load_tokens, power_of_2
from .triton_fwd import (
    Pair,
    index_strides,
    place,
    region_scalars,
    walk,
)
from .triton_tiling import dkv_tiling, dq_tiling


@triton.jit(do_not_specialize=["pairs", "k_regions"])
def bra_invert_kernel(indices, entries, starts, pairs, k_regions, BLOCK: tl.constexpr):
    """For one key region: where its list of (query region, slot) pairs begins, then the list in rising order."""
    pid = tl.program_id(0)
    key_region = pid % k_regions
    row = (pid // k_regions).to(tl.int64)
    base = indices + row * pairs
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        before += (tl.load(base + at, mask=at < pairs, other=k_regions) < key_region).to(tl.int32)
    first = tl.sum(before, 0)
    tl.store(starts + row * (k_regions + 1) + key_region, first)
    if key_region == k_regions - 1:
        tl.store(starts + row * (k_regions + 1) + k_regions, pairs)
    for start in range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mine = tl.load(base + at, mask=at < pairs, other=k_regions) == key_region
        rank = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(entries + row * pairs + first + rank - 1, at, mask=mine)
        first += tl.sum(mine.to(tl.int32), 0)


@triton.jit(do_not_specialize=["H", "W", "KH", "KW", "regions", "regions_w", "size_h", "size_w", "k_regions_w",
                               "k_size_h", "k_size_w", "tokens", "k_tokens", "topk", "tiles", "steps"])  # fmt: skip
def bra_bwd_dq_kernel(
    g, q, k, v, out, lse, delta, dq, indices, weights, pad_k, pad_v,
    g_b, g_y, g_x, g_h, q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h, i_b, i_h,
    H, W, KH, KW, heads, regions, regions_w, inv_regions_w, size_h, size_w, inv_size_w,
    k_regions_w, inv_k_regions_w, k_size_h, k_size_w, inv_k_size_w, tokens, k_tokens, inv_k_tokens, topk, tiles,
    steps, inv_steps, scale_log2, scale,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr, K_EDGE: tl.constexpr,
    HAS_PAD_K: tl.constexpr, HAS_PAD_V: tl.constexpr, HAS_WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries; also writes delta, the product of output and its gradient, per query."""
    pid = tl.program_id(0)
    head = pid % heads
    pid = pid // heads
    tile = pid % tiles
    pid = pid // tiles
    region = pid % regions
    b = (pid // regions).to(tl.int64)

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    y, x = place(m, region, regions_w, inv_regions_w, size_h, size_w, inv_size_w)
    inside = (y < H) & (x < W) & (m < tokens)
    at = ((b * H + y) * W + x) * heads + head
    queries = load_tokens(q + b * q_b + head * q_h, y * q_y + x * q_x, inside, inside, q, DIM, BLOCK_D, False, False)
    grads = load_tokens(g + b * g_b + head * g_h, y * g_y + x * g_x, inside, inside, g, DIM_V, BLOCK_DV, False, False)
    outs = load_tokens(out, at * DIM_V, inside, inside, out, DIM_V, BLOCK_DV, False, False)
    row_delta = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    tl.store(delta + at, row_delta, mask=inside)
    row_lse = tl.load(lse + at, mask=inside, other=float("inf")) * 1.4426950408889634

    k_base, v_base = k + b * k_b + head * k_h, v + b * v_b + head * v_h
    routed = indices + b * i_b + head * i_h + region * topk
    factors = weights + b * i_b + head * i_h + region * topk
    all_keys: tl.constexpr = WHOLE and not K_EDGE
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(0, tl.cdiv(topk * k_tokens, BLOCK_N) if PACKED else topk * steps):
        token, key_region, slot, wanted = walk(
            i, routed, topk, k_tokens, inv_k_tokens, steps, inv_steps, PACKED, BLOCK_N
        )
        ky, kx = place(token, key_region, k_regions_w, inv_k_regions_w, k_size_h, k_size_w, inv_k_size_w)
        k_inside = (ky < KH) & (kx < KW) if K_EDGE else wanted
        rows_k = load_tokens(
            k_base, ky * k_y + kx * k_x, k_inside, wanted, pad_k + head * DIM, DIM, BLOCK_D, all_keys, HAS_PAD_K
        )
        rows_v = load_tokens(
            v_base, ky * v_y + kx * v_x, k_inside, wanted, pad_v + head * DIM_V, DIM_V, BLOCK_DV, all_keys, HAS_PAD_V
        )
        s = tl.dot(queries, tl.trans(rows_k), input_precision=PRECISION)
        dp = tl.dot(grads, tl.trans(rows_v), input_precision=PRECISION)
        if HAS_WEIGHTS:
            if PACKED:
                factor = tl.load(factors + slot, mask=wanted, other=0.0).to(tl.float32)[None, :]
            else:
                factor = tl.load(factors + slot).to(tl.float32)
            s = s * factor
            dp = dp * factor
        p = tl.exp2(s * scale_log2 - row_lse[:, None])
        ds = p * (dp - row_delta[:, None])
        if HAS_WEIGHTS:
            ds = ds * factor
        if not WHOLE:
            ds = tl.where(wanted[None, :], ds, 0.0)
        acc = tl.dot(ds.to(rows_k.dtype), rows_k, acc, input_precision=PRECISION)

    d = tl.arange(0, BLOCK_D)
    tl.store(
        dq + at[:, None] * DIM + d[None, :],
        (acc * scale).to(dq.dtype.element_ty),
        mask=inside[:, None] & (d < DIM)[None, :],
    )


@triton.jit
def store_key_rows(acc, grad, pad_grad, at, row, inside, outside, dim: tl.constexpr, BLOCK: tl.constexpr,
                   HAS_PAD: tl.constexpr):  # fmt: skip
    """Rows inside the map to their places, the sum of those outside to this program's entry of `pad_grad`."""
    d = tl.arange(0, BLOCK)
    tl.store(
        grad + at[:, None] * dim + d[None, :],
        acc.to(grad.dtype.element_ty),
        mask=inside[:, None] & (d < dim)[None, :],
    )
    if HAS_PAD:
        tl.store(pad_grad + row * dim + d, tl.sum(tl.where(outside[:, None], acc, 0.0), 0), mask=d < dim)


@triton.jit(do_not_specialize=["H", "W", "KH", "KW", "regions_w", "size_h", "size_w", "k_regions", "k_regions_w",
                               "k_size_h", "k_size_w", "tokens", "k_tokens", "pairs", "topk", "tiles", "steps",
                               "list_heads"])  # fmt: skip
def bra_bwd_dkv_kernel(
    g, q, k, v, lse, delta, dk, dv, dpad_k, dpad_v, entries, starts, weights, pad_k, pad_v,
    g_b, g_y, g_x, g_h, q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h, i_b, i_h, list_heads,
    H, W, KH, KW, heads, regions_w, inv_regions_w, size_h, size_w, inv_size_w,
    k_regions, k_regions_w, inv_k_regions_w, k_size_h, k_size_w, inv_k_size_w, tokens, inv_tokens, k_tokens, pairs,
    topk, inv_topk, tiles, steps, inv_steps, scale_log2, scale,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr,
    HAS_PAD_K: tl.constexpr, HAS_PAD_V: tl.constexpr, HAS_WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, over the queries of the regions that read them."""
    pid = tl.program_id(0)
    head = pid % heads
    row = pid // heads
    tile = row % tiles
    key_region = (row // tiles) % k_regions
    b = (row // tiles // k_regions).to(tl.int64)

    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ky, kx = place(n, key_region, k_regions_w, inv_k_regions_w, k_size_h, k_size_w, inv_k_size_w)
    wanted = n < k_tokens
    k_inside = (ky < KH) & (kx < KW)
    rows_k = load_tokens(
        k + b * k_b + head * k_h, ky * k_y + kx * k_x, k_inside, wanted, pad_k + head * DIM, DIM, BLOCK_D, False,
        HAS_PAD_K,
    )  # fmt: skip
    rows_v = load_tokens(
        v + b * v_b + head * v_h, ky * v_y + kx * v_x, k_inside, wanted, pad_v + head * DIM_V, DIM_V, BLOCK_DV, False,
        HAS_PAD_V,
    )  # fmt: skip

    list_row = b * list_heads + (head if list_heads > 1 else 0)
    first = tl.load(starts + list_row * (k_regions + 1) + key_region)
    count = tl.load(starts + list_row * (k_regions + 1) + key_region + 1) - first
    mine = entries + list_row * pairs + first
    factors = weights + b * i_b + head * i_h
    q_base, g_base = q + b * q_b + head * q_h, g + b * g_b + head * g_h
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for i in range(0, tl.cdiv(count * tokens, BLOCK_M) if PACKED else count * steps):
        token, entry, _, read = walk(i, mine, count, tokens, inv_tokens, steps, inv_steps, PACKED, BLOCK_M)
        y, x = place(token, divide(entry, inv_topk), regions_w, inv_regions_w, size_h, size_w, inv_size_w)
        inside = (y < H) & (x < W) & read
        queries = load_tokens(q_base, y * q_y + x * q_x, inside, inside, q, DIM, BLOCK_D, False, False)
        grads = load_tokens(g_base, y * g_y + x * g_x, inside, inside, g, DIM_V, BLOCK_DV, False, False)
        at = ((b * H + y) * W + x) * heads + head
        row_lse = tl.load(lse + at, mask=inside, other=float("inf")) * 1.4426950408889634
        row_delta = tl.load(delta + at, mask=inside, other=0.0)
        s = tl.dot(rows_k, tl.trans(queries), input_precision=PRECISION)
        dp = tl.dot(rows_v, tl.trans(grads), input_precision=PRECISION)
        if HAS_WEIGHTS:
            if PACKED:
                factor = tl.load(factors + entry, mask=read, other=0.0).to(tl.float32)[None, :]
            else:
                factor = tl.load(factors + entry).to(tl.float32)
            s = s * factor
            dp = dp * factor
        p = tl.exp2(s * scale_log2 - row_lse[None, :])
        ds = p * (dp - row_delta[None, :])
        if HAS_WEIGHTS:
            ds = ds * factor
            p = p * factor
        acc_v = tl.dot(p.to(grads.dtype), grads, acc_v, input_precision=PRECISION)
        acc_k = tl.dot(ds.to(queries.dtype), queries, acc_k, input_precision=PRECISION)

    at = ((b * KH + ky) * KW + kx) * heads + head
    inside, outside = k_inside & wanted, wanted & (k_inside == 0)
    store_key_rows(acc_k * scale, dk, dpad_k, at, pid.to(tl.int64), inside, outside, DIM, BLOCK_D, HAS_PAD_K)
    store_key_rows(acc_v, dv, dpad_v, at, pid.to(tl.int64), inside, outside, DIM_V, BLOCK_DV, HAS_PAD_V)


@triton.jit(do_not_specialize=["H", "W", "KH", "KW", "regions", "regions_w", "size_h", "size_w", "k_regions_w",
                               "k_size_h", "k_size_w", "tokens", "k_tokens", "topk"])  # fmt: skip
def bra_bwd_dw_kernel(
    g, q, k, v, lse, delta, dw, indices, weights, pad_k, pad_v,
    g_b, g_y, g_x, g_h, q_b, q_y, q_x, q_h, k_b, k_y, k_x, k_h, v_b, v_y, v_x, v_h, i_b, i_h,
    H, W, KH, KW, heads, regions, regions_w, inv_regions_w, size_h, size_w, inv_size_w,
    k_regions_w, inv_k_regions_w, k_size_h, k_size_w, inv_k_size_w, tokens, k_tokens, topk, scale,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_PAD_K: tl.constexpr, HAS_PAD_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one weight for one head: sum of p * (dp - delta) * s + p * dp over its queries and keys."""
    pid = tl.program_id(0)
    head = pid % heads
    pid = pid // heads
    slot = pid % topk
    pid = pid // topk
    region = pid % regions
    b = (pid // regions).to(tl.int64)
    entry = b * i_b + head * i_h + region * topk + slot
    key_region = tl.load(indices + entry).to(tl.int32)
    factor = tl.load(weights + entry).to(tl.float32)
    acc = tl.zeros([BLOCK_M], tl.float32)
    for first_m in range(0, tokens, BLOCK_M):
        m = first_m + tl.arange(0, BLOCK_M)
        y, x = place(m, region, regions_w, inv_regions_w, size_h, size_w, inv_size_w)
        inside = (y < H) & (x < W) & (m < tokens)
        at = ((b * H + y) * W + x) * heads + head
        queries = load_tokens(
            q + b * q_b + head * q_h, y * q_y + x * q_x, inside, inside, q, DIM, BLOCK_D, False, False
        )
        grads = load_tokens(
            g + b * g_b + head * g_h, y * g_y + x * g_x, inside, inside, g, DIM_V, BLOCK_DV, False, False
        )
        row_lse = tl.load(lse + at, mask=inside, other=float("inf"))
        row_delta = tl.load(delta + at, mask=inside, other=0.0)
        for first_n in range(0, k_tokens, BLOCK_N):
            n = first_n + tl.arange(0, BLOCK_N)
            wanted = n < k_tokens
            ky, kx = place(n, key_region, k_regions_w, inv_k_regions_w, k_size_h, k_size_w, inv_k_size_w)
            k_inside = (ky < KH) & (kx < KW)
            rows_k = load_tokens(
                k + b * k_b + head * k_h, ky * k_y + kx * k_x, k_inside, wanted, pad_k + head * DIM, DIM, BLOCK_D,
                False, HAS_PAD_K,
            )  # fmt: skip
            rows_v = load_tokens(
                v + b * v_b + head * v_h, ky * v_y + kx * v_x, k_inside, wanted, pad_v + head * DIM_V, DIM_V,
                BLOCK_DV, False, HAS_PAD_V,
            )  # fmt: skip
            s = tl.dot(queries, tl.trans(rows_k), input_precision=PRECISION) * scale
            dp = tl.dot(grads, tl.trans(rows_v), input_precision=PRECISION)
            p = tl.where(wanted[None, :], tl.exp(s * factor - row_lse[:, None]), 0.0)
            acc += tl.sum(p * ((dp * factor - row_delta[:, None]) * s + dp), 1)
    tl.store(dw + ((b * heads + head) * regions + region) * topk + slot, tl.sum(acc, 0))


class Plan(NamedTuple):
    """The launches of one backward."""

    dq: Launch
    invert: Launch
    dkv: Launch
    dw: Launch | None
    list_rows: int
    pad_rows: int
    """Rows of partial gradients of the padding; 0 where there is none."""


@functools.lru_cache(4096)
def plan(
    g: Any, q: Any, k: Any, v: Any, indices: Any, weights: Any, pads: tuple[Any, Any], geometry: tuple[Pair, ...],
    scale: float, precision: str,
) -> Plan:  # fmt: skip
    """The launches for arguments of these shapes, strides and dtypes."""
    (B, H, W, heads, dim), (KH, KW), dim_v, topk = q[0], k[0][1:3], v[0][-1], indices[0][-1]
    num, size, kv_num, kv_size = geometry
    regions, k_regions, tokens, k_tokens = (
        num[0] * num[1],
        kv_num[0] * kv_num[1],
        size[0] * size[1],
        kv_size[0] * kv_size[1],
    )
    edge = kv_num[0] * kv_size[0] > KH or kv_num[1] * kv_size[1] > KW
    lists = 1 if len(indices[0]) == 3 else heads
    strides = (*(s for x in (g, q, k, v) for s in x[1][:4]), *index_strides(indices[0]))
    maps, region, k_region = (H, W, KH, KW, heads), region_scalars(num, size), region_scalars(kv_num, kv_size)
    dims = {"DIM": dim, "DIM_V": dim_v, "BLOCK_D": power_of_2(dim), "BLOCK_DV": power_of_2(dim_v)}
    has_pads = {"HAS_PAD_K": edge and pads[0] is not None, "HAS_PAD_V": edge and pads[1] is not None}
    end = {"HAS_WEIGHTS": weights is not None, "PRECISION": precision}

    way = dq_tiling(tokens, topk, k_tokens, max(dim, dim_v), edge)
    tiles, steps = triton.cdiv(tokens, way.held), way.steps(k_tokens)
    dq = Launch(
        bra_bwd_dq_kernel, B * heads * regions * tiles,
        (*strides, *maps, regions, *region, *k_region, tokens, k_tokens, 1 / k_tokens, topk, tiles, steps, 1 / steps,
         scale * LOG2E, scale),
        dict(**dims, BLOCK_M=way.held, BLOCK_N=way.step, PACKED=way.packed, WHOLE=way.whole(topk, k_tokens),
             K_EDGE=edge, **has_pads, **end),
        way.warps, way.stages,
    )  # fmt: skip
    pairs = regions * topk
    invert = Launch(
        bra_invert_kernel, B * lists * k_regions, (pairs, k_regions), {"BLOCK": min(1024, power_of_2(pairs))}
    )
    # A key region is read by topk * regions / k_regions regions on average.
    way = dkv_tiling(k_tokens, max(1, pairs // k_regions), tokens, max(dim, dim_v))
    tiles, steps = triton.cdiv(k_tokens, way.held), way.steps(tokens)
    dkv = Launch(
        bra_bwd_dkv_kernel, B * k_regions * tiles * heads,
        (*strides, lists, *maps, *region, k_regions, *k_region, tokens, 1 / tokens, k_tokens, pairs, topk, 1 / topk,
         tiles, steps, 1 / steps, scale * LOG2E, scale),
        dict(**dims, BLOCK_M=way.step, BLOCK_N=way.held, PACKED=way.packed, **has_pads, **end),
        way.warps, way.stages,
    )  # fmt: skip
    dw = None
    if weights is not None:
        dw = Launch(
            bra_bwd_dw_kernel, B * regions * topk * heads,
            (*strides, *maps, regions, *region, *k_region, tokens, k_tokens, topk, scale),
            dict(**dims, BLOCK_M=min(64, power_of_2(tokens)), BLOCK_N=min(64, power_of_2(k_tokens)), **has_pads,
                 PRECISION=precision),
        )  # fmt: skip
    return Plan(dq, invert, dkv, dw, B * lists, B * k_regions * tiles if edge else 0)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    num_regions: Pair,
    region_size: Pair,
    kv_num_regions: Pair,
    kv_region_size: Pair,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, weights, pad_k, pad_v; an empty tensor stands for each that was not given."""
    device = q.device
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (q, k, v))
    if q.numel() == 0 or indices.numel() == 0:
        given = [q.new_empty(0) if x is None else torch.zeros_like(x) for x in (weights, pad_k, pad_v)]
        return dq.zero_(), dk.zero_(), dv.zero_(), *given
    grad_out, q, k, v, indices = (unit_stride(x) for x in (grad_out, q, k, v, indices.contiguous()))
    weights, pad_k, pad_v = (x if x is None else x.contiguous() for x in (weights, pad_k, pad_v))
    geometry = (tuple(num_regions), tuple(region_size), tuple(kv_num_regions), tuple(kv_region_size))
    run = plan(
        meta(grad_out), meta(q), meta(k), meta(v), meta(indices), meta(weights), (meta(pad_k), meta(pad_v)), geometry,
        scale, dot_precision(q.dtype),
    )  # fmt: skip
    optional = [q if x is None else x for x in (weights, pad_k, pad_v)]

    delta = torch.empty_like(lse)
    run.dq(grad_out, q, k, v, out, lse, delta, dq, indices, *optional)

    # Which (query region, slot) pairs read each key region: pairs `region * topk + slot`, grouped by key region and
    # rising in each, and where each group begins.
    k_regions = kv_num_regions[0] * kv_num_regions[1]
    entries = torch.empty(indices.numel(), dtype=torch.int32, device=device)
    starts = torch.empty(run.list_rows * (k_regions + 1), dtype=torch.int32, device=device)
    run.invert(indices, entries, starts)

    pad_sums = [
        q if x is None or not run.pad_rows else torch.empty(run.pad_rows, *x.shape, dtype=torch.float32, device=device)
        for x in (pad_k, pad_v)
    ]
    run.dkv(grad_out, q, k, v, lse, delta, dk, dv, *pad_sums, entries, starts, *optional)

    dw = None
    if weights is not None and run.dw is not None:
        shape = (q.shape[0], q.shape[3], *indices.shape[-2:])
        per_head = torch.empty(shape, dtype=torch.float32, device=device)
        run.dw(grad_out, q, k, v, lse, delta, per_head, indices, *optional)
        dw = (per_head.sum(1) if weights.dim() == 3 else per_head).to(weights.dtype)

    def pad_grad(pad: Tensor | None, sums: Tensor) -> Tensor:
        if pad is None:
            return q.new_empty(0)
        return sums.sum(0).to(pad.dtype) if run.pad_rows else torch.zeros_like(pad)

    dw = q.new_empty(0) if dw is None else dw
    return dq, dk, dv, dw, pad_grad(pad_k, pad_sums[0]), pad_grad(pad_v, pad_sums[1])
