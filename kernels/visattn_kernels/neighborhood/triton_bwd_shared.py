"""Gradients that many queries share, of the table of biases and of additional keys; sums in a fixed order."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import Launch, dot_precision, meta
from ..triton_tiles import LOG2E, load_tokens, power_of_2
from .triton_fwd import (
    HIDDEN,
    across,
    axis_of_tile,
    members_of,
    on_axis,
    rows_of_box,
    rows_seen,
    shared_constants,
    strides_of,
    window_of,
)
from .triton_tiling import Windows, query_tiling

PROGRAMS = 1024
"""Programs that keep a GPU busy; images are divided among them."""


@triton.jit(do_not_specialize=["B", "Q0", "Q1", "Q2", "L0", "L1", "L2", "D0", "D1", "D2", "C0", "C1", "C2", "N0", "N1",
                               "N2", "heads", "group", "images"])  # fmt: skip
def na_bwd_pairs_kernel(
    g, q, k, v, bias, pad_k, pad_v, lse, delta, sums,
    g_b, g_0, g_1, g_2, g_h, q_b, q_0, q_1, q_2, q_h, k_b, k_0, k_1, k_2, k_h, v_b, v_0, v_1, v_2, v_h,
    B, Q0, Q1, Q2, L0, L1, L2, D0, D1, D2, C0, C1, C2, N0, N1, N2, heads, group, images, scale_log2,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    STEP0: tl.constexpr, STEP1: tl.constexpr, STEP2: tl.constexpr,
    OFF0: tl.constexpr, OFF1: tl.constexpr, OFF2: tl.constexpr,
    CAUSAL0: tl.constexpr, CAUSAL1: tl.constexpr, CAUSAL2: tl.constexpr,
    CLAMPED: tl.constexpr, MASK_OUTSIDE: tl.constexpr, REL_STEP: tl.constexpr, REL_WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_PAD: tl.constexpr, HAS_REL: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, DEEP: tl.constexpr,
    FULL0: tl.constexpr, FULL1: tl.constexpr, FULL2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits of a box of queries, summed over some images: (part, head, query, key of its window)."""
    pid = tl.program_id(0)
    head = pid % heads
    pid = pid // heads
    c2 = pid % C2
    pid = pid // C2
    c1 = pid % C1
    pid = pid // C1
    c0 = pid % C0
    part = pid // C0
    kv_head = head // group

    m = tl.arange(0, BLOCK_M)
    g0, p0, y0, first0, stop0, start0, w0 = axis_of_tile(
        c0, N0, D0, Q0, L0, m // (T1 * T2), T0, K0, S0, STEP0, OFF0, CAUSAL0, CLAMPED
    )
    g1, p1, y1, first1, stop1, start1, w1 = axis_of_tile(
        c1, N1, D1, Q1, L1, m // T2 % T1, T1, K1, S1, STEP1, OFF1, CAUSAL1, CLAMPED
    )
    g2, p2, y2, first2, stop2, start2, w2 = axis_of_tile(
        c2, N2, D2, Q2, L2, m % T2, T2, K2, S2, STEP2, OFF2, CAUSAL2, CLAMPED
    )
    there = (y0 < Q0) & (y1 < Q1) & (y2 < Q2) & (m < T0 * T1 * T2)
    query = (y0 * Q1 + y1) * Q2 + y2
    entry_m = ((p0 - K0 + 1) * (2 * K1 - 1) + p1 - K1 + 1) * (2 * K2 - 1) + p2 - K2 + 1
    slot_m = (first0 * K1 + first1) * K2 + first2
    table = bias + head * (2 * K0 - 1) * (2 * K1 - 1) * (2 * K2 - 1)
    zero = tl.full((), 0, tl.int64)
    sums += (part.to(tl.int64) * heads + head) * (Q0 * Q1 * Q2) * (K0 * K1 * K2)

    ROWS: tl.constexpr = BLOCK_N // COLUMNS
    parts = tl.cdiv(w2, COLUMNS)
    for i in range(0, tl.cdiv(w0 * w1, ROWS) * parts):
        u2 = i % parts * COLUMNS + tl.arange(0, BLOCK_N) % COLUMNS
        t0, t1, there1 = rows_of_box(i // parts, start0, start1, w1, w0 * w1, DEEP, ROWS, COLUMNS)
        t2, wanted = start2 + u2, there1 & (u2 < w2)
        ky0, ky1, ky2 = g0 + D0 * t0, g1 + D1 * t1, g2 + D2 * t2
        inside = on_axis(ky0, L0, CLAMPED) & on_axis(ky1, L1, CLAMPED) & on_axis(ky2, L2, CLAMPED)
        seen = rows_seen(
            wanted[None, :], across(t0, ROWS), across(t1, ROWS), first0[:, None], stop0[:, None], first1[:, None],
            stop1[:, None], FULL0, FULL1,
        )  # fmt: skip
        if not FULL2:
            seen = seen & (t2[None, :] >= first2[:, None]) & (t2[None, :] < stop2[:, None])
        seen = seen & there[:, None]
        entry_n = (t0 * (2 * K1 - 1) + t1) * (2 * K2 - 1) + t2
        biases = tl.load(table + entry_n[None, :] - entry_m[:, None])
        biases = tl.where(seen, biases, HIDDEN)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for image in range(part * images, tl.minimum((part + 1) * images, B)):
            b = zero + image
            queries = load_tokens(
                q + b * q_b + head * q_h, y0 * q_0 + y1 * q_1 + y2 * q_2, there, there, q, DIM, BLOCK_D, False, False
            )
            grads = load_tokens(
                g + b * g_b + head * g_h, y0 * g_0 + y1 * g_1 + y2 * g_2, there, there, g, DIM_V, BLOCK_DV, False, False
            )
            at = (b * (Q0 * Q1 * Q2) + query) * heads + head
            row_lse = tl.load(lse + at, mask=there, other=float("inf")) * 1.4426950408889634
            row_delta = tl.load(delta + at, mask=there, other=0.0)
            rows_k = load_tokens(
                k + b * k_b + kv_head * k_h, ky0 * k_0 + ky1 * k_1 + ky2 * k_2, inside, wanted, pad_k + kv_head * DIM,
                DIM, BLOCK_D, False, HAS_PAD,
            )  # fmt: skip
            rows_v = load_tokens(
                v + b * v_b + kv_head * v_h, ky0 * v_0 + ky1 * v_1 + ky2 * v_2, inside, wanted, pad_v + kv_head * DIM_V,
                DIM_V, BLOCK_DV, False, HAS_PAD,
            )  # fmt: skip
            s = tl.dot(queries, tl.trans(rows_k), input_precision=PRECISION)
            dp = tl.dot(grads, tl.trans(rows_v), input_precision=PRECISION)
            acc += tl.exp2(s * scale_log2 + biases - row_lse[:, None]) * (dp - row_delta[:, None])
        slot_n = (t0 * K1 + t1) * K2 + t2
        slots = ((zero + query) * (K0 * K1 * K2) - slot_m)[:, None] + slot_n[None, :]
        tl.store(sums + slots, acc, mask=seen)


@triton.jit(do_not_specialize=["parts", "Q0", "Q1", "Q2", "L0", "L1", "L2", "D0", "D1", "D2", "heads"])
def na_bwd_bias_kernel(
    sums, dbias, parts, Q0, Q1, Q2, L0, L1, L2, D0, D1, D2, heads,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    CAUSAL0: tl.constexpr, CAUSAL1: tl.constexpr, CAUSAL2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one entry of the table: sum over the queries that have a key at its offset."""
    pid = tl.program_id(0)
    entry = pid % ((2 * K0 - 1) * (2 * K1 - 1) * (2 * K2 - 1))
    head = pid // ((2 * K0 - 1) * (2 * K1 - 1) * (2 * K2 - 1))
    o0 = entry // ((2 * K1 - 1) * (2 * K2 - 1)) - K0 + 1
    o1 = entry // (2 * K2 - 1) % (2 * K1 - 1) - K1 + 1
    o2 = entry % (2 * K2 - 1) - K2 + 1
    count = Q0 * Q1 * Q2
    zero = tl.full((), 0, tl.int64)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        query = start + tl.arange(0, BLOCK)
        y0, y1, y2 = query // (Q1 * Q2), query // Q2 % Q1, query % Q2
        p0, p1, p2 = y0 // D0, y1 // D1, y2 // D2
        first0, stop0 = window_of(p0, tl.maximum(members_of(y0 % D0, L0, D0), K0), K0, S0, 1, 0, CAUSAL0, True)
        first1, stop1 = window_of(p1, tl.maximum(members_of(y1 % D1, L1, D1), K1), K1, S1, 1, 0, CAUSAL1, True)
        first2, stop2 = window_of(p2, tl.maximum(members_of(y2 % D2, L2, D2), K2), K2, S2, 1, 0, CAUSAL2, True)
        t0, t1, t2 = p0 + o0, p1 + o1, p2 + o2
        seen = (query < count) & (t0 >= first0) & (t0 < stop0) & (t1 >= first1) & (t1 < stop1) & (t2 >= first2)
        seen = seen & (t2 < stop2)
        slot = ((t0 - first0) * K1 + t1 - first1) * K2 + t2 - first2
        for part in range(0, parts):
            row = (zero + part * heads + head) * count + query
            acc += tl.load(sums + row * (K0 * K1 * K2) + slot, mask=seen, other=0.0)
    tl.store(dbias + head * ((2 * K0 - 1) * (2 * K1 - 1) * (2 * K2 - 1)) + entry, tl.sum(acc, 0))


@functools.lru_cache(4096)
def _bias_plan(
    g: Any, q: Any, k: Any, v: Any, bias: Any, pad: Any, windows: Windows, scale: float, precision: str
) -> tuple[Launch, Launch, int]:
    B, *q_grid, heads, dim = q[0]
    grid, kv_heads, dim_v = k[0][1:4], k[0][4], v[0][-1]
    way = query_tiling(tuple(q_grid), tuple(grid), windows, max(dim, dim_v), q[2].itemsize, backward=True)
    boxes = way.programs * heads
    images = triton.cdiv(B, max(1, min(B, PROGRAMS // boxes)))
    parts = triton.cdiv(B, images)
    shared = shared_constants(windows, q, v, precision, bias=bias, pad=pad)
    strides = (*strides_of(g), *strides_of(q), *strides_of(k), *strides_of(v))
    pairs = Launch(
        na_bwd_pairs_kernel, parts * boxes,
        (*strides, B, *q_grid, *grid, *windows.dilation, *way.counts, *way.tiles, heads, heads // kv_heads, images,
         scale * LOG2E),
        shared | way.constants(), 4 if way.held >= 64 else 2, 2,
    )  # fmt: skip
    entries = bias[0].numel()
    names = [f"{name}{a}" for name in ("K", "S", "CAUSAL") for a in range(3)]
    table = Launch(
        na_bwd_bias_kernel, entries, (parts, *q_grid, *grid, *windows.dilation, heads),
        {name: shared[name] for name in names} | {"BLOCK": 1024},
    )  # fmt: skip
    return pairs, table, parts


def bias_gradient(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """Gradient of the table; arguments as ``triton_bwd.backward`` has them at hand."""
    *filled, lse, delta, bias, optional, windows, scale = rest
    pairs, table, parts = _bias_plan(
        meta(g), meta(q), meta(k), meta(v), meta(bias), meta(optional[3]), windows, scale, dot_precision(q.dtype)
    )
    tokens = q.shape[1] * q.shape[2] * q.shape[3]
    k0, k1, k2 = windows.kernel_size
    sums = torch.empty(parts * q.shape[4] * tokens * k0 * k1 * k2, dtype=torch.float32, device=q.device)
    pairs(g, q, k, v, filled[0], filled[3], filled[4], lse, delta, sums)
    dbias = torch.empty(bias.shape, dtype=torch.float32, device=q.device)
    table(sums, dbias)
    return dbias.to(bias.dtype)


@triton.jit(do_not_specialize=["Q0", "Q1", "Q2", "heads", "group", "extra", "chunks"])
def na_bwd_extra_kernel(
    g, q, extra_k, extra_v, lse, delta, dk, dv,
    g_b, g_0, g_1, g_2, g_h, q_b, q_0, q_1, q_2, q_h, Q0, Q1, Q2, heads, group, extra, chunks, scale_log2, scale,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of some additional keys of a head, over all queries."""
    pid = tl.program_id(0)
    chunk = pid % chunks
    kv_head = pid // chunks % (heads // group)
    b = (pid // chunks // (heads // group)).to(tl.int64)
    n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (b * (heads // group) + kv_head) * extra + n
    rows_k = load_tokens(extra_k, row * DIM, n < extra, n < extra, extra_k, DIM, BLOCK_D, False, False)
    rows_v = load_tokens(extra_v, row * DIM_V, n < extra, n < extra, extra_v, DIM_V, BLOCK_DV, False, False)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    count = Q0 * Q1 * Q2
    steps = tl.cdiv(count, BLOCK_M)
    for i in range(0, steps * group):
        head = kv_head * group + i // steps
        query = i % steps * BLOCK_M + tl.arange(0, BLOCK_M)
        y0, y1, y2 = query // (Q1 * Q2), query // Q2 % Q1, query % Q2
        read = query < count
        queries = load_tokens(
            q + b * q_b + head * q_h, y0 * q_0 + y1 * q_1 + y2 * q_2, read, read, q, DIM, BLOCK_D, False, False
        )
        grads = load_tokens(
            g + b * g_b + head * g_h, y0 * g_0 + y1 * g_1 + y2 * g_2, read, read, g, DIM_V, BLOCK_DV, False, False
        )
        at = (b * count + query) * heads + head
        row_lse = tl.load(lse + at, mask=read, other=float("inf")) * 1.4426950408889634
        row_delta = tl.load(delta + at, mask=read, other=0.0)
        s = tl.dot(rows_k, tl.trans(queries), input_precision=PRECISION)
        dp = tl.dot(rows_v, tl.trans(grads), input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - row_lse[None, :])
        ds = p * (dp - row_delta[None, :])
        acc_v = tl.dot(p.to(grads.dtype), grads, acc_v, input_precision=PRECISION)
        acc_k = tl.dot(ds.to(queries.dtype), queries, acc_k, input_precision=PRECISION)
    d, d_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    there = (n < extra)[:, None]
    tl.store(dk + row[:, None] * DIM + d[None, :], (acc_k * scale).to(dk.dtype.element_ty), mask=there & (d < DIM))
    tl.store(dv + row[:, None] * DIM_V + d_v[None, :], acc_v.to(dv.dtype.element_ty), mask=there & (d_v < DIM_V))


@functools.lru_cache(4096)
def _extra_plan(g: Any, q: Any, k: Any, v: Any, scale: float, precision: str) -> Launch:
    B, *q_grid, heads, dim = q[0]
    kv_heads, extra, dim_v = k[0][1], k[0][2], v[0][-1]
    held = min(64, power_of_2(extra))
    chunks = triton.cdiv(extra, held)
    return Launch(
        na_bwd_extra_kernel, B * kv_heads * chunks,
        (*strides_of(g), *strides_of(q), *q_grid, heads, heads // kv_heads, extra, chunks, scale * LOG2E, scale),
        {"DIM": dim, "DIM_V": dim_v, "BLOCK_D": power_of_2(dim), "BLOCK_DV": power_of_2(dim_v), "PRECISION": precision,
         "BLOCK_M": 32 if max(dim, dim_v) > 64 or q[2].itemsize == 4 else 64, "BLOCK_N": held},
    )  # fmt: skip


def extra_gradients(
    g: Tensor, q: Tensor, extra_k: Tensor, extra_v: Tensor, lse: Tensor, delta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients (B, M, kv_heads, dim) of additional keys and values, which are given heads first."""
    dk, dv = torch.empty_like(extra_k), torch.empty_like(extra_v)
    launch = _extra_plan(meta(g), meta(q), meta(extra_k), meta(extra_v), scale, dot_precision(q.dtype))
    launch(g, q, extra_k, extra_v, lse, delta, dk, dv)
    return dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous()
